"""The folder of a sample dataset: what its manifest names, and nothing else."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from medspark.errors import UsageError
from medspark.ingest.lock import locked
from medspark.ingest.parts import SAMPLE_SCHEMA, Part, PartWriter
from medspark.ingest.write import SampleSet, SamplesManifest

DEFAULTS = {"string": "x", "int32": 1, "int64": 1, "double": 1.0, "bool": True, "binary": b"ab"}


def sample(**values: object) -> dict[str, object]:
    return {field.name: DEFAULTS[str(field.type)] for field in SAMPLE_SCHEMA} | values


def manifest(**values: object) -> SamplesManifest:
    given: dict[str, object] = {
        "generation": "g2",
        "previous": "g1",
        "digest": "d",
        "counts": {},
        "rendering": {},
        "key_check": "k",
        "parts": (),
        "ledger": (),
        "quarantine": (),
    }
    return SamplesManifest.model_validate(given | values)


@pytest.mark.parametrize("base", ["{tmp}", "memory://parts"])
def test_a_part_knows_its_rows_bytes_and_hash(tmp_path, base):
    from medspark.ingest import storage

    folder = base.format(tmp=tmp_path)
    writer = PartWriter(folder, "data/g/p.parquet")

    numbers = [writer.add(sample(sample_key=str(i), pixels=bytes(1 << 20))) for i in range(20)]
    part = writer.close()

    system, path = storage.filesystem(f"{folder}/data/g/p.parquet")
    content = system.cat_file(path)
    assert numbers == list(range(20))
    assert part == Part(
        path="data/g/p.parquet",
        rows=20,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    with system.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        assert parquet.read(["sample_key"])["sample_key"].to_pylist() == [str(i) for i in range(20)]
        assert parquet.num_row_groups == 3  # eight megabytes of pixels each, not all in memory


def test_a_part_without_rows_is_no_file(tmp_path):
    assert PartWriter(str(tmp_path), "data/g/p.parquet").close() is None
    assert list(tmp_path.iterdir()) == []


def test_parts_that_killed_tasks_left_beside_the_committed_ones_are_removed(tmp_path):
    named = "data/g2/kept.parquet"
    for name in (named, "data/g2/of-a-killed-task.parquet", "data/g1/of-the-one-before.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    samples = SampleSet(str(tmp_path))
    samples.commit(manifest(parts=[Part(path=named, rows=1, bytes=1, sha256="s")]))

    samples.clean_newest()

    left = {str(path.relative_to(tmp_path)) for path in (tmp_path / "data").rglob("*.parquet")}
    # Of the generation before, a reader may still be at it.
    assert left == {named, "data/g1/of-the-one-before.parquet"}


def test_cleaning_leaves_what_manifests_name_and_nothing_else(tmp_path):
    files = [
        *("data/g1/kept.parquet", "data/g1/dead.parquet", "data/g3/orphan.parquet"),
        *("ledger/g0/x", "ledger/g1/x", "ledger/g2/x", "ledger/g3/x"),
        *("quarantine/g0/x", "quarantine/g2/x", "staging/files/x"),
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    samples = SampleSet(str(tmp_path))
    part = Part(path="data/g1/kept.parquet", rows=1, bytes=0, sha256="")
    samples.commit(manifest(parts=(part,)))

    samples.clean()

    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {
        *("manifest.json", "data/g1/kept.parquet"),
        *("ledger/g1/x", "ledger/g2/x", "quarantine/g2/x"),
    }


def killed(folder: Path) -> SampleSet:
    """Return a dataset in which an ingest was killed."""
    samples = SampleSet(str(folder))
    samples.commit(manifest())
    for name in ("staging/files/part-0", "ledger/g1/x", "ledger/g2/x", "ledger/g3/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return samples


def test_a_job_that_only_reads_clears_what_a_killed_ingest_left(tmp_path):
    killed(tmp_path).clean_after_kill()

    assert not (tmp_path / "staging").exists()
    assert {path.name for path in (tmp_path / "ledger").iterdir()} == {"g1", "g2"}


def test_a_job_that_only_reads_leaves_an_ingest_at_its_work(tmp_path, caplog):
    samples = killed(tmp_path)

    with locked(samples.url):
        samples.clean_after_kill()

    assert (tmp_path / "staging/files/part-0").exists()
    assert "stays there: Another job is writing" in caplog.text


def test_a_job_that_only_reads_writes_nothing_where_nothing_was_left(tmp_path):
    samples = SampleSet(str(tmp_path))
    samples.commit(manifest())

    samples.clean_after_kill()

    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_manifest_comes_back_as_it_went(tmp_path):
    samples = SampleSet(str(tmp_path))
    assert samples.manifest() is None

    samples.commit(manifest())

    assert samples.manifest() == manifest()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not a manifest"), ("[]", "not a manifest"), ('{"schema_version": 9}', "version 9")],
)
def test_another_file_is_not_taken_for_a_manifest(tmp_path, text, said):
    (tmp_path / "manifest.json").write_text(text)

    with pytest.raises(UsageError, match=said):
        SampleSet(str(tmp_path)).manifest()


def test_a_truncated_manifest_is_refused(tmp_path):
    record = json.loads(manifest().model_dump_json())
    del record["parts"]
    (tmp_path / "manifest.json").write_text(json.dumps(record))

    with pytest.raises(UsageError, match="not a manifest"):
        SampleSet(str(tmp_path)).manifest()


def _hold(folder: str, ready: object, for_ever: object) -> None:
    with locked(folder):
        ready.set()  # type: ignore[attr-defined]
        for_ever.wait()  # type: ignore[attr-defined]


def test_the_second_writer_is_told_and_a_killed_one_does_not_stand_in_the_way(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready, for_ever = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(str(tmp_path), ready, for_ever))
    first.start()
    assert ready.wait(60)

    with pytest.raises(UsageError, match=f"process {first.pid}"), locked(str(tmp_path)):
        pass
    first.kill()
    first.join()

    with locked(str(tmp_path)):
        pass


def test_a_lock_in_an_object_store_says_what_to_remove():
    with (
        locked("memory://dataset"),
        pytest.raises(UsageError, match=r"remove memory://dataset/\.lock"),
        locked("memory://dataset"),
    ):
        pass
    with locked("memory://dataset"):
        pass


def test_samples_of_the_first_version_have_one_label_each(tmp_path):
    record = manifest().model_dump(mode="json", exclude={"multi_label"}) | {"schema_version": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(record))

    kept = SampleSet(str(tmp_path)).manifest()

    assert kept is not None
    assert not kept.multi_label
