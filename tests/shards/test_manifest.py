"""A dataset consists of the files in its manifest; other files are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.files import sha256_of
from medspark.shards.manifest import (
    NAME,
    Manifest,
    Shard,
    Split,
    digest_of,
    read_manifest,
    verify,
    write_manifest,
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    (folder / "data").mkdir(parents=True)
    shards = []
    for number in range(2):
        path = folder / "data" / f"train-{number}.parquet"
        path.write_bytes(bytes([number]) * 100)
        shards.append(Shard(path=f"data/{path.name}", rows=10, bytes=100, sha256=sha256_of(path)))
    splits = {"train": Split(rows=20, patients=5, class_counts=(9, 11), shards=tuple(shards))}
    write_manifest(
        folder,
        Manifest(
            digest=digest_of(splits),
            generation="g",
            classes=("a", "b"),
            height=2,
            width=5,
            channels=1,
            bits=8,
            seed=0,
            splits=splits,
            leak_check={"patients": 0},
            source={},
        ),
    )
    return folder


def test_a_manifest_comes_back_as_it_was_written(dataset: Path):
    manifest = read_manifest(dataset)

    verify(dataset, manifest)
    assert manifest.splits["train"].rows == 20
    assert manifest.pixel_format.shape == (2, 5, 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "zero length": (lambda path: path.write_bytes(b""), "has 0 bytes instead of 100"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:60]), "has 60 bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() * 2), "has 200 bytes"),
    "one bit flipped": (flip_a_bit, "has been damaged"),
    "another shard in its place": (
        lambda path: shutil.copy(path.with_name("train-0.parquet"), path), "has been damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_refused_by_name(dataset: Path, damage: str):
    spoil, sentence = DAMAGE[damage]
    spoil(dataset / "data" / "train-1.parquet")

    with pytest.raises(UsageError, match=rf"train-1\.parquet {sentence}"):
        verify(dataset, read_manifest(dataset))


@pytest.mark.parametrize("name", ["train-9.parquet", "train-1 (copy).parquet", "part.tmp"])
def test_a_stray_file_among_the_shards_is_refused_by_name(dataset: Path, name: str):
    (dataset / "data" / name).write_bytes(b"stray")

    with pytest.raises(UsageError, match=rf"{re.escape(name)} lies among the shards"):
        verify(dataset, read_manifest(dataset))


@pytest.mark.parametrize("name", [".train-0.parquet.crc", "_SUCCESS"])
def test_files_that_no_reader_takes_for_data_are_left_alone(dataset: Path, name: str):
    (dataset / "data" / name).write_bytes(b"")

    verify(dataset, read_manifest(dataset))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a manifest"),
        ("[]", "is not a manifest"),
        ("{}", "has schema version None"),
        (json.dumps({"schema_version": 99}), "has schema version 99"),
        (json.dumps({"schema_version": 1}), "is not a manifest"),
        ("[" * 100_000, "is not a manifest"),
        ('{"a": ' * 100_000, "is not a manifest"),
    ],
)
def test_what_is_not_a_manifest_is_refused(dataset: Path, text: str, sentence: str):
    (dataset / NAME).write_text(text)

    with pytest.raises(UsageError, match=sentence):
        read_manifest(dataset)


def test_a_manifest_of_any_size_is_read_to_its_limit_only(dataset: Path):
    with (dataset / NAME).open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room

    with pytest.raises(UsageError, match="cannot be read: it is larger than"):
        read_manifest(dataset)


def test_a_folder_without_a_manifest_is_not_a_dataset(tmp_path: Path):
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(UsageError, match="There is no shard folder"):
        read_manifest(tmp_path / "nowhere")


def test_the_digest_follows_the_content_and_not_the_folder(dataset: Path):
    splits = read_manifest(dataset).splits
    swapped = {
        "train": splits["train"].model_copy(
            update={"shards": tuple(reversed(splits["train"].shards))}
        )
    }

    assert digest_of(splits) == read_manifest(dataset).digest
    assert digest_of(swapped) != digest_of(splits)


SPLITS = st.dictionaries(
    st.sampled_from(["train", "val", "test"]),
    st.lists(st.text("0123456789abcdef", min_size=64, max_size=64), max_size=3),
    min_size=1,
)


def splits_of(shards: dict[str, list[str]]) -> dict[str, Split]:
    return {
        name: Split(
            rows=0,
            patients=0,
            class_counts=(),
            shards=tuple(Shard(path="p", rows=0, bytes=0, sha256=sha) for sha in shas),
        )
        for name, shas in shards.items()
    }


@given(SPLITS, SPLITS, st.booleans(), st.booleans())
@example({"train": ["a"]}, {"val": ["a"]}, False, False)
@example({"train": ["a", "b"]}, {"train": ["b", "a"]}, False, False)
@example({"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}, False, False)
@example({"train": ["a"]}, {"train": ["a"]}, False, True)
def test_two_datasets_have_one_digest_only_if_they_hold_the_same(one, other, masks, other_masks):
    digests = [
        digest_of(splits_of(shards), multi_label=multi_label)
        for shards, multi_label in ((one, masks), (other, other_masks))
    ]
    # A split without shards counts as missing.
    held = [{name: shas for name, shas in shards.items() if shas} for shards in (one, other)]
    same = held[0] == held[1] and masks == other_masks
    assert (digests[0] == digests[1]) == same


@given(SPLITS, st.randoms(use_true_random=False))
def test_the_digest_does_not_depend_on_the_order_in_which_splits_are_told(shards, random):
    names = random.sample(list(shards), len(shards))

    assert digest_of(splits_of(shards)) == digest_of(splits_of({n: shards[n] for n in names}))


def test_the_digest_of_a_dataset_is_that_of_the_version_before():
    told = splits_of({"val": ["a" * 64], "train": ["b" * 64, "c" * 64]})

    assert digest_of(told)[:16] == "bc42ab171a4fe8b8"
    assert digest_of(told, multi_label=True)[:16] == "c28ac51d5d2bd417"


def test_without_contents_sizes_alone_are_looked_at(dataset: Path):
    flip_a_bit(dataset / "data" / "train-1.parquet")
    verify(dataset, read_manifest(dataset), contents=False)

    (dataset / "data" / "train-1.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match="has 0 bytes"):
        verify(dataset, read_manifest(dataset), contents=False)


def test_writing_a_manifest_leaves_nothing_beside_it_and_replaces_the_old_one(dataset: Path):
    manifest = read_manifest(dataset).model_copy(update={"generation": "another"})

    write_manifest(dataset, manifest)

    assert read_manifest(dataset) == manifest
    assert {path.name for path in dataset.iterdir()} == {NAME, "data"}


def test_a_manifest_of_the_first_version_has_one_class_for_each_image(dataset: Path):
    record = json.loads((dataset / NAME).read_text()) | {"schema_version": 1}
    del record["multi_label"]
    (dataset / NAME).write_text(json.dumps(record))

    manifest = read_manifest(dataset)

    assert not manifest.multi_label
    assert manifest.targets(np.array([1, 0])).tolist() == [1, 0]


def test_masks_are_other_targets_and_another_digest_than_classes(dataset: Path):
    manifest = read_manifest(dataset).model_copy(update={"multi_label": True})

    assert manifest.targets(np.array([0, 1, 2, 3])).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert digest_of(manifest.splits, multi_label=True) != digest_of(manifest.splits)


def test_more_findings_than_a_mask_holds_are_refused(dataset: Path):
    record = json.loads((dataset / NAME).read_text())
    record |= {"multi_label": True, "classes": [f"finding {k}" for k in range(31)]}
    (dataset / NAME).write_text(json.dumps(record))
    assert len(read_manifest(dataset).classes) == 31

    record |= {"classes": [f"finding {k}" for k in range(32)]}
    (dataset / NAME).write_text(json.dumps(record))

    with pytest.raises(UsageError, match="is not a manifest"):
        read_manifest(dataset)
