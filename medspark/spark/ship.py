"""Pack Python packages as zip files with byte code: medspark for workers, and PySpark itself."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import io
import marshal
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import medspark

__all__ = ["package_file", "package_zip", "repack"]

# PEP 552: a hash-based .pyc file that Python does not compare with its source.
_UNCHECKED_HASH = (1).to_bytes(4, "little")


@functools.cache
def package_zip() -> bytes:
    """Return medspark as a zip file that Python can import from.

    The zip holds the byte code of every module, so that worker processes need not compile it. A
    worker with another version of Python reads the source.
    """
    root = Path(medspark.__file__).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*.py")):
            name, source = str(path.relative_to(root.parent)), path.read_bytes()
            archive.writestr(name, source)
            archive.writestr(f"{name}c", _byte_code(source, name))
    return buffer.getvalue()


@functools.cache
def package_file() -> Path:
    """Return the path of a file ``medspark.zip``, which is removed when this process ends.

    All sessions share the file: Spark refuses a second file of the same name.
    """
    folder = tempfile.mkdtemp(prefix="medspark-ship-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / "medspark.zip"
    target.write_bytes(package_zip())
    return target


def repack(zipped: Path) -> None:
    """Add byte code to ``zipped``, a zip file of Python sources, and remove its tests.

    PySpark ships in this form. Without byte code, each driver and worker compiles for a second.
    Tests are most entries of the zip's directory, which workers read before each task (see
    ``task``). The file is replaced atomically. Another version of Python reads the sources.
    """
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(zipped) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        names = set(old.namelist())
        if any(f"{name}c" in names for name in names):
            return
        for name in sorted(names):
            if "/tests/" not in name:
                source = old.read(name)
                new.writestr(name, source)
                if name.endswith(".py"):
                    new.writestr(f"{name}c", _byte_code(source, name))
    beside = zipped.with_suffix(f".{os.getpid()}")
    try:
        beside.write_bytes(buffer.getvalue())
        shutil.copymode(zipped, beside)
        beside.replace(zipped)
    finally:
        beside.unlink(missing_ok=True)


def _byte_code(source: bytes, name: str) -> bytes:
    code = compile(source, name, "exec", dont_inherit=True)
    header = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + importlib.util.source_hash(source)
    return header + marshal.dumps(code)
