"""Zip files of Python: what is imported from them is not compiled again."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from medspark.ingest.ship import add_byte_code


def sources(path: Path) -> Path:
    """Write a zip file of a package, with a file that is none of Python's."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("parts/__init__.py", "from parts.one import value")
        archive.writestr("parts/one.py", "value = __file__")
        archive.writestr("parts/table.txt", "kept")
    path.chmod(0o640)
    return path


def test_modules_of_a_zip_are_imported_from_their_byte_code(tmp_path: Path):
    zipped = sources(tmp_path / "parts.zip")

    add_byte_code(zipped)

    asked = [sys.executable, "-c", "import parts; print(parts.value)"]
    found = subprocess.run(
        asked, env={"PYTHONPATH": str(zipped)}, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(zipped / "parts" / "one.pyc")
    assert zipfile.ZipFile(zipped).read("parts/table.txt") == b"kept"
    assert zipped.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [zipped]


def test_a_zip_that_has_byte_code_is_left_alone(tmp_path: Path):
    zipped = sources(tmp_path / "parts.zip")
    add_byte_code(zipped)
    before = zipped.stat()

    add_byte_code(zipped)

    assert zipped.stat() == before
