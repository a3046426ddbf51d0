"""A dataset is checked before the first step, and the error names the problem."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medspark.data import petastorm
from medspark.data.config import DataConfig
from medspark.data.petastorm_import import import_petastorm
from medspark.data.source import Source, open_source
from medspark.errors import UsageError
from medspark.shards.local import local_shards

WriteShards = Callable[..., Path]


def test_a_flipped_bit_is_found_and_its_file_named(write_shards: WriteShards):
    folder = write_shards()
    path = folder / "data/train-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(UsageError, match="train-00001"):
        open_source(folder, DataConfig())


def test_a_truncated_shard_is_found_by_its_size(write_shards: WriteShards):
    folder = write_shards()
    path = folder / "data/val-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(UsageError, match="val-00000"):
        open_source(folder, DataConfig(verify="size"))


def test_a_missing_split_is_named(write_shards: WriteShards):
    source = open_source(write_shards(), DataConfig())

    with pytest.raises(UsageError, match="no holdout images"):
        source.split("holdout")


@pytest.mark.petastorm
@pytest.mark.parametrize("name", ["_common_metadata", "_metadata"])
def test_petastorm_metadata_is_refused_before_petastorm_opens_it(
    name: str, write_shards: WriteShards
):
    folder = write_shards()
    # What Petastorm would unpickle; it need not even be valid to be refused.
    (folder / "data" / name).write_bytes(b"cbuiltins\neval\n(S'1/0'\ntR.")
    source = open_source(folder, DataConfig(reader="petastorm"))

    with pytest.raises(UsageError, match=name):
        source.training(global_batch=8, seed=0, rank=0, world=1)


def test_a_pickled_schema_inside_a_shard_is_refused(tmp_path: Path):
    table = pa.table({"a": [1]}).replace_schema_metadata({"dataset-toolkit.unischema.v1": b"c"})
    pq.write_table(table, tmp_path / "x.parquet")

    with pytest.raises(UsageError, match=r"x\.parquet"):
        petastorm.refuse_pickles(tmp_path, [tmp_path / "x.parquet"])


def test_a_pyarrow_that_petastorm_cannot_use_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pa, "__version__", "21.0.0")

    with pytest.raises(UsageError, match=r"medspark\[petastorm\]"):
        import_petastorm()


def test_a_remote_dataset_is_copied_once_and_read_from_there(
    write_shards: WriteShards, tmp_path_factory: pytest.TempPathFactory
):
    folder, cache = write_shards(), tmp_path_factory.mktemp("cache")
    remote = fsspec.filesystem("memory")
    remote.put(str(folder), "/bucket/shards", recursive=True)

    place = local_shards("memory://bucket/shards", cache)
    stamps = {path: path.stat().st_mtime_ns for path in place.rglob("*.parquet")}
    again = open_source(Path("memory://bucket/shards"), DataConfig(cache_dir=cache))

    assert again.folder == place
    assert len(again.split("train")) == 50
    assert stamps == {path: path.stat().st_mtime_ns for path in place.rglob("*.parquet")}


def test_a_remote_dataset_is_not_copied_into_somebody_elses_folder(
    write_shards: WriteShards, tmp_path_factory: pytest.TempPathFactory
):
    cache = tmp_path_factory.mktemp("cache")
    (cache / "theirs").write_text("theirs")
    fsspec.filesystem("memory").put(str(write_shards()), "/other/shards", recursive=True)

    with pytest.raises(UsageError, match="not medspark's"):
        local_shards("memory://other/shards", cache)

    assert [path.name for path in cache.iterdir()] == ["theirs"]


def test_a_remote_dataset_goes_to_the_users_cache_by_default(
    write_shards: WriteShards, tmp_path_factory: pytest.TempPathFactory, monkeypatch
):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    fsspec.filesystem("memory").put(str(write_shards()), "/home/shards", recursive=True)

    place = local_shards("memory://home/shards")

    assert place.parent == home / "medspark"
    assert place.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("shards", ["file:///tmp/x", "file:/tmp/x", "/tmp/x"])
def test_a_local_dataset_is_read_where_it_lies(shards: str):
    assert local_shards(shards, None) == Path("/tmp/x")


def test_a_share_is_of_the_training_images_alone_and_reads_them_as_they_are(
    write_shards: WriteShards,
):
    folder = write_shards(rows=50)
    whole = open_source(folder, DataConfig()).split("train")

    source = open_source(folder, DataConfig(share=0.3), seed=1)
    part = source.split("train")
    images, labels = part.gather(np.arange(len(part)))

    assert len(part) == 15
    assert len(source.split("test")) == 50
    everything, truth = whole.gather(np.arange(50))
    known = {image.tobytes(): label for image, label in zip(everything, truth, strict=True)}
    assert [known[image.tobytes()] for image in images] == list(labels) == list(part.labels)
    assert source.training(global_batch=4, seed=0, rank=0, world=1).steps == 4


def test_a_share_depends_on_the_seed_and_lies_in_a_larger_one(write_shards: WriteShards):
    folder = write_shards(rows=50)

    small, other, large = (
        open_source(folder, DataConfig(share=share), seed=seed).split("train")
        for share, seed in ((0.3, 1), (0.3, 2), (0.6, 1))
    )

    inside, elsewhere, around = (
        {image.tobytes() for image in split.gather(np.arange(len(split)))[0]}
        for split in (small, other, large)
    )
    assert inside < around
    assert inside != elsewhere


@pytest.mark.petastorm
def test_a_share_is_refused_where_the_reader_cannot_choose_images(write_shards: WriteShards):
    with pytest.raises(UsageError, match=r"data\.share needs the native reader"):
        open_source(write_shards(), DataConfig(reader="petastorm", share=0.5))


def test_a_split_without_rows_is_one_that_is_not_there(write_shards: WriteShards):
    folder = write_shards()
    source = open_source(folder, DataConfig())
    empty = source.manifest.splits["val"].model_copy(update={"rows": 0, "shards": ()})
    splits = source.manifest.splits | {"val": empty}
    manifest = source.manifest.model_copy(update={"splits": splits})

    with pytest.raises(UsageError, match="no val images"):
        Source(folder, manifest, DataConfig()).split("val")


def test_a_copy_that_was_cut_short_is_made_again(
    write_shards: WriteShards, tmp_path_factory: pytest.TempPathFactory
):
    folder, cache = write_shards(), tmp_path_factory.mktemp("cut")
    fsspec.filesystem("memory").put(str(folder), "/cut/shards", recursive=True)
    place = local_shards("memory://cut/shards", cache)
    (path, *_) = sorted(place.rglob("*.parquet"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])

    local_shards("memory://cut/shards", cache)

    assert path.read_bytes() == whole
