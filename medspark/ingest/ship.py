"""The package as a zip file, for workers that do not have it installed."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import medspark

# Zip entries carry a time; a fixed one gives the same bytes, so the same hash, for the same code.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def package_zip(folder: str | Path | None = None) -> Path:
    """Write the source of medspark as ``medspark.zip`` into ``folder`` and return its path.

    A new temporary folder is made where none is given. The same code gives the same bytes.
    """
    target = Path(folder or tempfile.mkdtemp(prefix="medspark-ship-")) / "medspark.zip"
    root = Path(medspark.__file__).parent
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for source in sorted(root.rglob("*.py")):
            entry = zipfile.ZipInfo(str(source.relative_to(root.parent)), _EPOCH)
            archive.writestr(entry, source.read_bytes(), zipfile.ZIP_DEFLATED)
    return target
