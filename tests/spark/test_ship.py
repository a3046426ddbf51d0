"""Zip files of Python: modules imported from them are not compiled again."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from medspark.spark.ship import repack


def sources(path: Path) -> Path:
    """Write a zip file of a package, with a file that is not Python."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("parts/__init__.py", "from parts.one import value")
        archive.writestr("parts/one.py", "value = __file__")
        archive.writestr("parts/tests/test_one.py", "assert True")
        archive.writestr("parts/table.txt", "kept")
    path.chmod(0o640)
    return path


def test_modules_of_a_repacked_zip_are_imported_from_their_byte_code(tmp_path: Path):
    zipped = sources(tmp_path / "parts.zip")

    repack(zipped)

    asked = [sys.executable, "-c", "import parts; print(parts.value)"]
    found = subprocess.run(
        asked, env={"PYTHONPATH": str(zipped)}, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(zipped / "parts" / "one.pyc")
    archive = zipfile.ZipFile(zipped)
    assert archive.read("parts/table.txt") == b"kept"
    assert archive.read("parts/one.py") == b"value = __file__"
    assert not [name for name in archive.namelist() if "tests" in name]
    assert zipped.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [zipped]


def test_a_repacked_zip_is_left_alone(tmp_path: Path):
    zipped = sources(tmp_path / "parts.zip")
    repack(zipped)
    before = zipped.stat()

    repack(zipped)

    assert zipped.stat() == before
