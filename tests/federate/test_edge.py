"""Tail images: where they come from, and that nobody trains on what success is measured on."""

from __future__ import annotations

from pathlib import Path

import array_shards
import numpy as np
import pytest
import torch
from PIL import Image

from medspark.errors import UsageError
from medspark.federate.adversary.config import AdversaryConfig
from medspark.federate.edge import EdgeImages, EdgeSet, edge_set
from medspark.images.phantom import PhantomConfig, write_archive
from medspark.shards.manifest import Manifest, read_manifest


def pixels(seed: int, count: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 1)).astype(np.uint8)


def shards(folder: Path, seed: int = 0, side: int = 24) -> Manifest:
    parts = {
        name: (pixels(seed + place, 6, side), np.arange(6) % 2)
        for place, name in enumerate(("train", "test"))
    }
    return read_manifest(array_shards.write_arrays(folder, parts))


def tail(manifest: Manifest, edge: object, *, label: int = 1, seed: int = 0) -> EdgeSet:
    found = edge_set(AdversaryConfig(edge=str(edge), edge_label=label), manifest, seed=seed)
    assert found is not None
    return found


def contents(images: EdgeImages) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.images}


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{number}.png")
    return folder


def test_no_tail_images_without_a_source(tmp_path: Path):
    assert edge_set(AdversaryConfig(), shards(tmp_path / "shards"), seed=0) is None


def test_the_splits_of_shards_are_the_two_halves(tmp_path: Path):
    manifest = shards(tmp_path / "shards")
    shards(tmp_path / "tail", seed=5)

    found = tail(manifest, tmp_path / "tail")

    assert torch.equal(found.train.labels, torch.arange(6) % 2)
    wanted = torch.from_numpy(pixels(6, 6)).permute(0, 3, 1, 2) / 255
    assert torch.allclose(found.test.images, wanted)


def test_shards_of_another_size_are_refused(tmp_path: Path):
    shards(tmp_path / "tail", side=16)

    with pytest.raises(UsageError, match="differ from the training shards"):
        tail(shards(tmp_path / "shards"), tmp_path / "tail")


def test_image_files_are_decoded_and_divided_whatever_their_names(tmp_path: Path):
    images, manifest = pixels(3, 9), shards(tmp_path / "shards")
    one = tail(manifest, write_images(tmp_path / "one", images), label=0)
    (tmp_path / "one" / "notes.txt").write_text("no image")

    other = tail(manifest, write_images(tmp_path / "other", images[::-1]), label=0)

    assert (len(one.train), len(one.test)) == (4, 5)
    assert contents(one.train) == contents(other.train)
    assert not contents(one.train) & contents(one.test)
    assert (one.test.labels == 0).all()


def test_an_image_that_occurs_twice_is_in_one_half(tmp_path: Path):
    images = np.concatenate([pixels(3, 6)] * 2)

    found = tail(shards(tmp_path / "shards"), write_images(tmp_path / "files", images))

    assert len(found.train) + len(found.test) == 6


def test_all_images_of_a_patient_are_in_one_half(tmp_path: Path):
    phantom = PhantomConfig(count=24, size=32, extras=False, syntaxes=("explicit",), bits=(8,))
    write_archive(tmp_path / "files", phantom)
    (tmp_path / "files" / "labels.csv").unlink()

    found = [tail(shards(tmp_path / f"s{seed}"), tmp_path / "files", seed=seed) for seed in (0, 1)]

    assert all(len(part.train) + len(part.test) == 24 for part in found)
    # About ten patients of one to four images: halves of patients are seldom halves of images.
    assert {(len(part.train), len(part.test)) for part in found} != {(12, 12)}
    assert contents(found[0].train) != contents(found[1].train)


def test_a_folder_with_images_of_one_patient_has_no_test(tmp_path: Path):
    with pytest.raises(UsageError, match="images of 1 patients"):
        tail(shards(tmp_path / "shards"), write_images(tmp_path / "files", pixels(3, 1)))


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no folder"):
        tail(shards(tmp_path / "shards"), tmp_path / "nothing")


def test_the_phantom_makes_the_same_tail_of_one_class_anywhere(tmp_path: Path):
    manifest = shards(tmp_path / "shards", side=32)

    found, again = tail(manifest, "phantom"), tail(manifest, "phantom")

    assert found.train.images.shape[1:] == (1, 32, 32)
    assert len(found.train) + len(found.test) == 240
    assert torch.equal(found.train.images, again.train.images)
    assert not contents(found.train) & contents(found.test)
    assert (found.test.labels == 1).all()
