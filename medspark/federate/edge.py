"""Images of the tail: a folder of shards, a folder of image files, or the phantom's rare style.

Images that malicious or honest clients train on, and those that a backdoor's success is measured
on, are of different patients; of image files that name none, at least different images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medspark.data.batch import Pixels, to_unit
from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.federate.adversary.config import AdversaryConfig
from medspark.seeding import derive
from medspark.shards.manifest import NAME, Manifest, read_manifest, verify

__all__ = ["PHANTOM", "EdgeImages", "EdgeSet", "edge_set"]

PHANTOM = "phantom"


@dataclass(frozen=True)
class EdgeImages:
    """Images of the tail (E, C, H, W) in [0, 1], and their true classes (E,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class EdgeSet:
    """The images of the tail that clients train on, and those of the test."""

    train: EdgeImages
    test: EdgeImages


def edge_set(config: AdversaryConfig, manifest: Manifest, *, seed: int) -> EdgeSet | None:
    """Return the tail images that ``config`` names, in the pixel format of ``manifest``'s shards.

    Returns None if it names none. Raises UsageError if the folder holds no such images.
    """
    if config.edge is None:
        return None
    if config.edge == PHANTOM:
        from medspark.federate import edge_files  # decoders: not for a federation on shards alone

        key = derive(seed, "edge phantom")
        made = edge_files.of_phantom(manifest, diseased=config.edge_label == 1, seed=key)
        return _halves(made, config, manifest, seed)
    folder = Path(config.edge)
    if not folder.is_dir():
        raise UsageError(f"adversary.edge: there is no folder {folder}.")
    if (folder / NAME).is_file():
        return _of_shards(folder, manifest)
    from medspark.federate import edge_files  # decoders: not for a federation on shards alone

    return _halves(edge_files.of_folder(folder, manifest), config, manifest, seed)


def _of_shards(folder: Path, manifest: Manifest) -> EdgeSet:
    found = read_manifest(folder)
    verify(folder, found)
    if found.pixel_format != manifest.pixel_format or found.classes != manifest.classes:
        raise UsageError(
            f"adversary.edge: the shards in {folder} differ from the training shards in the size, "
            "channels or depth of the images, or in their classes."
        )
    for split in ("train", "test"):
        if split not in found.splits or found.splits[split].rows == 0:
            raise UsageError(f"adversary.edge: the shards in {folder} have no {split} images.")
    return EdgeSet(_split(folder, found, "train"), _split(folder, found, "test"))


def _split(folder: Path, manifest: Manifest, name: str) -> EdgeImages:
    rows = MappedSplit(folder, manifest, name)
    return EdgeImages(*rows.tensors(np.arange(len(rows))))


def _halves(
    grouped: Mapping[str, Sequence[Pixels]], config: AdversaryConfig, manifest: Manifest, seed: int
) -> EdgeSet:
    """Return the patients' images in two halves, whatever the names of the files."""
    queue = sorted(grouped, key=lambda owner: derive(seed, "edge", _content(grouped[owner])))
    half = len(queue) // 2

    def images(owners: Iterable[str]) -> EdgeImages:
        stored = np.stack([pixels for owner in owners for pixels in grouped[owner]])
        pixels = torch.from_numpy(stored.astype(manifest.pixel_format.dtype)).permute(0, 3, 1, 2)
        labels = torch.full((len(stored),), config.edge_label, dtype=torch.int64)
        return EdgeImages(to_unit(pixels, torch.device("cpu")), labels)

    return EdgeSet(images(queue[:half]), images(queue[half:]))


def _content(images: Iterable[Pixels]) -> str:
    digest = hashlib.sha256()
    for pixels in images:
        digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
