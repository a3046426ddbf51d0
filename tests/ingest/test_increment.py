"""An ingest that settles only what changed gives the dataset that settling everything gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from archive_runs import live, put, quarantine, standing, values

from medspark.errors import UsageError
from medspark.ingest import increment
from medspark.ingest.increment import Increment
from medspark.ingest.sample_set import SampleSet, SamplesManifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

Run = Callable[..., dict[str, Any]]
# What a row of the ledger says, but for where its pixels and its own file are.
SAID = (
    "file_key", "frame", "outcome", "reason", "duplicate_of", "sample_key", "patient_key", "label",
    "pixel_key", "present", "speaks_for_file",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small archive be settled by increments."""
    monkeypatch.setattr(increment, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(increment, "_MOST_NEW", 9.0)
    monkeypatch.setattr(increment, "_MOST_SUPERSEDED", 9.0)


@pytest.fixture
def increments(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note for every increment whether it was enough."""
    noted: list[bool] = []
    settle = Increment.settle

    def noting(self: Increment, *rows: Any) -> Any:
        replaced = settle(self, *rows)
        noted.append(replaced is not None)
        return replaced

    monkeypatch.setattr(Increment, "settle", noting)
    return noted


def manifest(samples: Path) -> SamplesManifest:
    found = SampleSet(str(samples)).manifest()
    assert found
    return found


def said(samples: Path) -> list[tuple[Any, ...]]:
    return sorted((tuple(row[name] for name in SAID) for row in standing(samples)), key=repr)


def told(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k not in ("quarantine_file", "samples_folder")}


def change(source: Path, chance: random.Random) -> None:
    """Add, change, copy, relabel, damage or remove a few files."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for _ in range(4):
        name, label = f"{chance.randrange(40)}", chance.choice("AB")
        match chance.randrange(5):
            case 0 | 1:
                put(source, **{f"{label}__{name}": chance.randrange(12)})
            case 2:
                (source / label / name).write_bytes(b"")
            case 3:
                chance.choice(files).unlink(missing_ok=True)
            case 4:
                copied = chance.choice([path for path in files if path.exists()])
                (source / label / name).write_bytes(copied.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_increments_and_settling_everything_anew_agree(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance, source = random.Random(seed), tmp_path / "in"
    put(source, **{f"{'AB'[n % 2]}__{n}": n % 7 + 12 * (n % 2) for n in range(16)})
    (source / "A" / "bad").write_bytes(b"")
    by_parts, anew = tmp_path / "parts", tmp_path / "anew"

    for _ in range(4):
        one = run(source, by_parts)
        with monkeypatch.context() as patch:
            patch.setattr(Increment, "fits", staticmethod(lambda *_, **__: False))
            other = run(source, anew)
        assert told(one) == told(other)
        assert said(by_parts) == said(anew)
        assert manifest(by_parts).digest == manifest(anew).digest
        assert set(live(by_parts)) == set(live(anew))
        assert quarantine(by_parts) == quarantine(anew)
        change(source, chance)


def test_an_increment_writes_the_rows_that_a_change_concerns_and_no_others(
    run: Run, tmp_path: Path, increments: list[bool]
) -> None:
    source, samples = tmp_path / "in", tmp_path / "out"
    put(source, **{f"A__{n}": n for n in range(20)})
    run(source, samples)
    first = manifest(samples)
    put(source, A__copy=3, A__new=30)

    run(source, samples)

    second = manifest(samples)
    assert increments == [True]
    assert set(first.ledger) < set(second.ledger)
    assert second.settled
    assert (second.settled.rows, second.settled.superseded) == (23, 1)  # the copied image's row
    assert len(values(samples)) == 21


def test_what_has_to_be_sealed_is_in_clear_in_no_file_of_the_ledger(
    run: Run, tmp_path: Path, increments: list[bool]
) -> None:
    source, samples = tmp_path / "in", tmp_path / "out"
    put(source, A__one=1, A__two=2, B__three=3)
    run(source, samples)
    put(source, B__torn=1)

    result = run(source, samples)

    assert increments == [False]
    assert result["quarantine_reasons"] == {"conflicting_label": 2}
    assert not manifest(samples).superseded
    torn = [row for row in standing(samples) if row["reason"] == "conflicting_label"]
    assert [row["patient_key"] for row in torn] == [None, None]
    assert set(manifest(samples).ledger).isdisjoint(manifest(samples).retired)


def test_a_sample_that_is_damaged_later_is_in_clear_in_no_file_of_the_ledger(
    run: Run, tmp_path: Path, increments: list[bool]
) -> None:
    source, samples = tmp_path / "in", tmp_path / "out"
    put(source, A__one=1, A__two=2, B__three=3)
    run(source, samples)
    (source / "A" / "one").write_bytes(b"torn")

    run(source, samples)

    assert increments == [False]
    (bad,) = [row for row in standing(samples) if row["outcome"] == "quarantined"]
    named = [
        row
        for file in manifest(samples).ledger
        for row in pq.read_table(samples / file).to_pylist()
        if row["file_key"] == bad["file_key"]
    ]
    assert [row["patient_key"] for row in named] == [None]


def test_files_of_earlier_generations_stay_while_the_manifest_names_them(
    run: Run, tmp_path: Path, increments: list[bool]
) -> None:
    source, samples = tmp_path / "in", tmp_path / "out"
    put(source, A__one=1, B__two=2)
    for number in range(4):
        put(source, **{f"A__more{number}": 10 + number})
        run(source, samples)

    assert increments == [True] * 3
    named = manifest(samples).named()
    assert all((samples / name).exists() for name in named)
    assert len(values(samples)) == 6


def test_a_lost_private_list_is_made_again_by_settling_everything(
    run: Run, tmp_path: Path, increments: list[bool]
) -> None:
    source, samples = tmp_path / "in", tmp_path / "out"
    put(source, A__one=1, B__two=2)
    (source / "B" / "bad").write_bytes(b"")
    result = run(source, samples)
    Path(result["quarantine_file"]).unlink()
    put(source, A__three=3)

    run(source, samples)

    assert increments == []
    assert list(quarantine(samples)) == [str(source / "B" / "bad")]


def test_another_source_settles_everything_and_then_each_its_increments(
    run: Run, spark: SparkSession, tmp_path: Path, increments: list[bool]
) -> None:
    one, two, samples = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    put(one, A__one=1, B__two=2)
    put(two, A__three=3, B__four=1)
    run(one, samples)
    run(two, samples)
    assert increments == []
    put(two, A__five=5)

    result = run(two, samples)

    assert increments == [True]
    assert (result["files_seen"], result["samples"], result["quarantined"]) == (3, 2, 1)


def inventory(source: Path, path: Path, *names: str) -> Path:
    rows = [(name, (source / name).stat()) for name in names]
    lines = [f"{name},{status.st_size},{status.st_mtime_ns}" for name, status in rows]
    path.write_text("\n".join(["path,size,modified", *lines]) + "\n")
    return path


@pytest.mark.parametrize("torn", [False, True])
def test_an_inventory_of_changes_does_what_a_listing_does(
    run: Run, tmp_path: Path, increments: list[bool], torn: bool
) -> None:
    source, partly, wholly = tmp_path / "in", tmp_path / "partly", tmp_path / "wholly"
    put(source, **{f"A__{n}": n for n in range(8)})
    (source / "A" / "bad").write_bytes(b"")
    for samples in (partly, wholly):
        run(source, samples)
    put(source, A__3=30, A__new=40, A__copy=5)
    more = {"B/torn"} if torn else set()
    put(source, **{name.replace("/", "__"): 6 for name in more})
    names = ("A/3", "A/4", "A/new", "A/copy", *more)

    one = run(source, partly, inventory=str(inventory(source, tmp_path / "i.csv", *names)),
              inventory_of="changes")  # fmt: skip
    other = run(source, wholly)

    assert increments == [not torn] * 2
    assert told(one) == told(other)
    assert said(partly) == said(wholly)
    assert manifest(partly).digest == manifest(wholly).digest
    # A/6 has the pixels of B/torn. Its path is in no inventory: the next listing tells it.
    untold = {str(source / "A" / "6")} if torn else set()
    assert set(quarantine(partly)) == set(quarantine(wholly)) - untold
    run(source, partly)
    assert quarantine(partly) == quarantine(wholly)


def test_an_inventory_of_changes_needs_a_dataset_and_an_inventory(run: Run, tmp_path: Path) -> None:
    put(tmp_path / "in", A__one=1)
    listed = str(inventory(tmp_path / "in", tmp_path / "i.csv", "A/one"))

    with pytest.raises(UsageError, match="needs an ingest of all files before"):
        run(tmp_path / "in", tmp_path / "out", inventory=listed, inventory_of="changes")
    with pytest.raises(UsageError, match="needs --inventory"):
        run(tmp_path / "in", tmp_path / "out", inventory_of="changes")


def test_a_patient_counts_once_however_often_new_images_come(
    run: Run, tmp_path: Path, increments: list[bool]
) -> None:
    source, samples, table = tmp_path / "in", tmp_path / "out", tmp_path / "labels.csv"
    put(source, A__1=1, A__2=2, A__3=3)
    lines = [f"A/{n},A,person-{n % 2}" for n in range(1, 7)]
    table.write_text("\n".join(["path,label,patient_id", *lines]) + "\n")
    first = run(source, samples, labels=str(table))
    put(source, A__4=4, A__5=5)

    second = run(source, samples, labels=str(table))

    assert increments == [True]
    assert first["patients"] == second["patients"] == 2
    assert second["frames"] == 5
