"""Python packages as zip files with byte code: ours for workers without it, and Spark's own."""

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

__all__ = ["add_byte_code", "package_file", "package_zip"]

# PEP 552: a hash-based .pyc file that is not compared with its source.
_UNCHECKED_HASH = (1).to_bytes(4, "little")


@functools.cache
def package_zip() -> bytes:
    """Return medspark as a zip file that Python imports from as it is.

    Beside every module lies its byte code, so that not every process of a worker compiles it
    again; a worker with another version of Python reads the source.
    """
    root = Path(medspark.__file__).parent
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*.py")):
            name, source = str(path.relative_to(root.parent)), path.read_bytes()
            archive.writestr(name, source)
            archive.writestr(f"{name}c", _byte_code(source, name))
    return whole.getvalue()


@functools.cache
def package_file() -> Path:
    """Return the path of a file ``medspark.zip``, which is removed when this process ends.

    It is the same for every session: Spark refuses a second file of one name.
    """
    folder = tempfile.mkdtemp(prefix="medspark-ship-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / "medspark.zip"
    target.write_bytes(package_zip())
    return target


def add_byte_code(zipped: Path) -> None:
    """Put the byte code of every module into ``zipped``, a zip file of sources, if it lacks there.

    Spark's Python comes so, and each driver and worker would compile a second of it anew. The file
    is replaced at once; a Python of another version reads the sources.
    """
    whole = io.BytesIO()
    with (
        zipfile.ZipFile(zipped) as sources,
        zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        names = set(sources.namelist())
        lacking = {name for name in names if name.endswith(".py") and f"{name}c" not in names}
        if not lacking:
            return
        for name in sources.namelist():
            source = sources.read(name)
            archive.writestr(name, source)
            if name in lacking:
                archive.writestr(f"{name}c", _byte_code(source, name))
    beside = zipped.with_suffix(f".{os.getpid()}")
    beside.write_bytes(whole.getvalue())
    shutil.copymode(zipped, beside)
    beside.replace(zipped)


def _byte_code(source: bytes, name: str) -> bytes:
    code = compile(source, name, "exec", dont_inherit=True)
    header = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + importlib.util.source_hash(source)
    return header + marshal.dumps(code)
