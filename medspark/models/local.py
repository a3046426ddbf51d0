"""Models as local files: where they lie, or a copy of the model at an address."""

from __future__ import annotations

from pathlib import Path

from medspark.errors import UsageError
from medspark.files import json_digest

__all__ = ["local_model"]


def local_model(path: Path) -> Path:
    """Return a local path of the model folder or file ``path``; one at an address is copied.

    The copy is named by what the store tells of the files, so that a changed model gets a new one.
    Raises UsageError if nothing is there.
    """
    if "://" not in str(path):
        return path
    from medspark import remote, storage  # a device that predicts has no fsspec

    system, inside = storage.filesystem(path)
    is_file = system.isfile(inside)
    base = inside.rpartition("/")[0] if is_file else inside
    found = {inside: system.info(inside)} if is_file else system.find(inside, detail=True)
    if not found:
        raise UsageError(f"There is no model at {path}.")
    files = [remote.RemoteFile(name[len(base) + 1 :], int(e["size"])) for name, e in found.items()]
    told = [(name, entry["size"], entry.get("ETag")) for name, entry in sorted(found.items())]
    url = str(path.parent if is_file else path)
    place = remote.copied(url, files, None, name=json_digest([url, told])[:32])
    return place / path.name if is_file else place
