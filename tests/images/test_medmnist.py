"""MedMNIST archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from medspark.errors import UsageError
from medspark.images.medmnist import is_medmnist, read_medmnist

RNG = np.random.default_rng(0)


def archive(folder: Path, shape: tuple[int, ...] = (28, 28), **changes: Any) -> Path:
    arrays: dict[str, npt.NDArray[Any]] = {}
    for count, split in enumerate(("train", "val", "test"), start=2):
        arrays[f"{split}_images"] = RNG.integers(0, 256, (count, *shape)).astype(np.uint8)
        arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8)[:, None]
    np.savez(folder / "data.npz", **(arrays | changes))
    return folder / "data.npz"


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
def test_every_image_comes_with_its_split_and_label(tmp_path: Path, shape: tuple[int, ...]) -> None:
    examples = list(read_medmnist(archive(tmp_path, shape)))

    assert [example.split for example in examples] == ["train"] * 2 + ["val"] * 3 + ["test"] * 4
    assert [example.label for example in examples[2:5]] == [(0,), (1,), (2,)]
    assert {example.pixels.shape for example in examples} == {shape}


def test_an_archive_is_known_by_its_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))

    assert is_medmnist(archive(tmp_path))
    assert not is_medmnist(tmp_path / "other.npz")
    assert not is_medmnist(tmp_path / "none.npz")


@pytest.mark.parametrize(
    "changes",
    [
        {"train_images": np.zeros((2, 28, 28, 28), np.uint8)},
        {"train_images": np.zeros((2, 28, 28))},
        {"train_labels": np.zeros((3, 1), np.uint8)},
        {"train_images": np.array([object(), object()])},
    ],
    ids=["volumes", "floats", "labels", "pickled"],
)
def test_an_archive_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = archive(tmp_path, **changes)

    with pytest.raises(UsageError, match=r"data\.npz"):
        list(read_medmnist(path))
