"""The folder of a sample dataset: only the files that its manifest names count."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.ingest.parts import SAMPLE_SCHEMA, Part, PartWriter
from medspark.ingest.sample_set import MANIFEST, SampleSet, SamplesManifest
from medspark.lock import locked

GENERATIONS = tuple(f"20260101T00000{number}-abcdef" for number in (1, 2, 3))
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
    from medspark import storage

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


# Generations, oldest first, with a file of each.
G = [f"2026010{day}T000000-00000{day}" for day in range(1, 5)]
KEPT, DEAD, NEW = (f"{letter * 32}.parquet" for letter in "abc")


def write_all(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def left_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}


def commit(folder: Path, part: str) -> SampleSet:
    samples, named = SampleSet(str(folder)), Part(path=part, rows=1, bytes=0, sha256="")
    samples.commit(manifest(generation=G[2], previous=G[1], parts=(named,)))
    return samples


def test_parts_that_killed_tasks_left_beside_the_committed_ones_are_removed(tmp_path):
    before = f"data/{G[1]}/{DEAD}"
    write_all(tmp_path, [f"data/{G[2]}/{KEPT}", f"data/{G[2]}/{DEAD}", before])

    commit(tmp_path, f"data/{G[2]}/{KEPT}").clean_newest()

    # A reader may still use the previous generation.
    assert left_in(tmp_path) == {f"data/{G[2]}/{KEPT}", before}


def test_cleaning_leaves_what_manifests_name_and_nothing_else_of_ours(tmp_path):
    kept = [f"data/{G[1]}/{KEPT}", f"ledger/{G[1]}/{NEW}", f"ledger/{G[2]}/{NEW}"]
    kept += [f"quarantine/{G[2]}/{NEW}"]
    gone = [f"data/{G[1]}/{DEAD}", f"data/{G[3]}/{NEW}", f"ledger/{G[0]}/{NEW}"]
    gone += [f"ledger/{G[3]}/{NEW}", f"quarantine/{G[0]}/{NEW}", "staging/labels.parquet"]
    gone += [
        f"staging/files/{name}" for name in ("part-0.snappy.parquet", "_SUCCESS", ".part-0.crc")
    ]
    gone += ["staging/outcomes/_temporary/0/task/part-1.parquet"]
    write_all(tmp_path, [*kept, *gone])

    commit(tmp_path, kept[0]).clean()

    assert left_in(tmp_path) == set(kept)
    assert not (tmp_path / "staging").exists()


PLACES = (
    "",
    "data",
    f"data/{G[0]}",
    f"ledger/{G[3]}",
    "quarantine/mine",
    "staging",
    "staging/files",
)
STRANGE = ("notes.txt", "x.parquet", "a.dcm", f"{KEPT}.bak", "manifest.json.old", "_SUCCESS.txt")


@given(
    planted=st.sets(st.tuples(st.sampled_from(PLACES), st.sampled_from(STRANGE)), max_size=8),
    committed=st.booleans(),
)
def test_files_of_others_stay_wherever_they_lie(tmp_path_factory, planted, committed):
    folder = tmp_path_factory.mktemp("samples")
    theirs = {f"{place}/{name}".lstrip("/") for place, name in planted}
    write_all(folder, [*theirs, f"data/{G[3]}/{DEAD}"])
    samples = commit(folder, f"data/{G[2]}/{KEPT}") if committed else SampleSet(str(folder))

    samples.clean()
    samples.clean_newest()

    assert left_in(folder) == theirs


def killed(folder: Path) -> SampleSet:
    """Return a dataset in which an ingest was killed."""
    samples, (first, second, third) = SampleSet(str(folder)), GENERATIONS
    samples.commit(manifest(generation=second, previous=first))
    left = [f"ledger/{name}/{'0' * 32}.parquet" for name in (first, second, third)]
    for name in ("staging/files/part-0", *left):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return samples


def test_a_job_that_only_reads_clears_what_a_killed_ingest_left(tmp_path):
    killed(tmp_path).clean_after_kill()

    assert not (tmp_path / "staging").exists()
    assert {path.parent.name for path in tmp_path.glob("ledger/*/*")} == {*GENERATIONS[:2]}


def test_a_job_that_only_reads_leaves_an_ingest_at_its_work(tmp_path, caplog):
    samples = killed(tmp_path)

    with locked(samples.url):
        samples.clean_after_kill()

    assert (tmp_path / "staging/files/part-0").exists()
    assert f"stay in {samples.url}: Another job is writing" in caplog.text


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


def test_samples_of_the_first_version_have_one_label_each(tmp_path):
    record = manifest().model_dump(mode="json", exclude={"multi_label"}) | {"schema_version": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(record))

    kept = SampleSet(str(tmp_path)).manifest()

    assert kept is not None
    assert not kept.multi_label
