"""A patient who is forgotten leaves nothing in the dataset, and nobody else loses anything."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from archive_runs import listed, live

from medspark import ownership
from medspark.errors import UsageError
from medspark.images.deidentify import Privacy, Pseudonyms, load_key
from medspark.ingest import forget as forgetting
from medspark.ingest import increment
from medspark.ingest.forget import ForgetConfig, forget, open_dataset, read_patients
from medspark.ingest.sample_set import SampleSet, SamplesManifest

KEY = Pseudonyms(b"0123456789abcdefghijklmnop")


@pytest.fixture
def leave(spark: Any, key_file: Path, tmp_path: Path) -> Any:
    def leave(samples: Path, *patients: str, dry_run: bool = False) -> dict[str, Any]:
        named = tmp_path / "patients.txt"
        named.write_text("\n".join(patients))
        privacy = Privacy(key_file=key_file, quarantine_file=listed(samples))
        config = ForgetConfig(samples=str(samples), patients=named, privacy=privacy)
        dataset = open_dataset(config)
        return forget(spark, dataset, read_patients(named, dataset.pseudonyms), dry_run=dry_run)

    return leave


def archive(folder: Path, rows: dict[str, tuple[str, str, int]]) -> Path:
    """Write PNG files, each with a patient, a label and the number of its image."""
    from archive_runs import png

    folder.mkdir(exist_ok=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "patient_id"])
        for name, (patient, label, number) in rows.items():
            (folder / name).write_bytes(b"torn" if number < 0 else png(number))
            table.writerow([name, label, patient])
    return folder


ROWS = {
    "a.png": ("Ada", "sick", 1),
    "b.png": ("Ada", "well", 2),
    "c.png": ("Bob", "sick", 3),
    "d.png": ("Cyd", "well", 1 + 3),
    "e.png": ("Cyd", "well", -1),
}


def ingest(run: Any, source: Path, samples: Path) -> dict[str, Any]:
    found: dict[str, Any] = run(source, samples, labels=str(source / "labels.csv"))
    return found


def stored(samples: Path) -> list[dict[str, Any]]:
    """Return all rows of all Parquet files on disk, whether the manifest names them or not."""
    return [row for path in samples.rglob("*.parquet") for row in pq.read_table(path).to_pylist()]


# --- with Spark ---


@pytest.mark.spark
def test_nothing_of_a_forgotten_patient_is_left_on_disk(run, leave, key_file, tmp_path):
    samples = tmp_path / "samples"
    ingest(run, archive(tmp_path / "in", ROWS), samples)
    before = live(samples)
    theirs = {key: row for key, row in before.items() if row["pixels"][0] in (1, 2)}
    patients = {row["patient_key"] for row in theirs.values()}

    removed = leave(samples, "Ada")

    rows = stored(samples)
    assert (removed["patients"], removed["samples"], removed["files"]) == (1, 2, 2)
    assert len(theirs) == 2
    assert not [row for row in rows if patients & {row.get("patient_key")}]
    assert not [row for row in rows if row.get("pixels") in {r["pixels"] for r in theirs.values()}]
    assert not [row for row in rows if row.get("sample_key") in theirs]


@pytest.mark.spark
def test_nothing_of_a_forgotten_patient_is_in_a_ledger_that_grew_by_increments(
    run, leave, tmp_path, monkeypatch
):
    monkeypatch.setattr(increment, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(increment, "_MOST_NEW", 9.0)
    samples, more = tmp_path / "samples", {"f.png": ("Ada", "sick", 6), "g.png": ("Dan", "well", 8)}
    ingest(run, archive(tmp_path / "in", ROWS), samples)
    ingest(run, archive(tmp_path / "in", ROWS | more), samples)
    grown = SampleSet(str(samples)).manifest()
    theirs = {row["patient_key"] for row in live(samples).values() if row["pixels"][0] in (1, 2, 6)}

    removed = leave(samples, "Ada")

    assert grown.superseded
    assert (removed["patients"], removed["samples"]) == (len(theirs), 3)
    assert not [row for row in stored(samples) if theirs & {row.get("patient_key")}]
    assert sorted(row["pixels"][0] for row in live(samples).values()) == [3, 4, 8]


@pytest.mark.spark
def test_nobody_else_loses_anything(run, leave, tmp_path):
    # More files than tasks, so that a part holds images of several patients.
    more = {f"m{n}.png": (f"Dan {n % 2}", "well", 20 + n) for n in range(60)}
    samples = tmp_path / "samples"
    ingest(run, archive(tmp_path / "in", ROWS | more), samples)
    before, quarantined = live(samples), listed(samples).read_text()

    leave(samples, "Ada")

    others = {key: row for key, row in before.items() if row["pixels"][0] not in (1, 2)}
    assert live(samples) == others
    assert len(others) == 2 + len(more)
    assert listed(samples).read_text() == quarantined


@pytest.mark.spark
def test_the_dataset_is_the_one_that_an_archive_without_the_patient_gives(run, leave, tmp_path):
    rest = {name: row for name, row in ROWS.items() if row[0] != "Ada"}
    ingest(run, archive(tmp_path / "in", ROWS), tmp_path / "samples")
    leave(tmp_path / "samples", "Ada")
    for name in ROWS.keys() - rest.keys():
        (tmp_path / "in" / name).unlink()

    again = ingest(run, archive(tmp_path / "in", rest), tmp_path / "samples")

    fresh = ingest(run, tmp_path / "in", tmp_path / "fresh")
    digests = [SampleSet(str(tmp_path / name)).manifest().digest for name in ("samples", "fresh")]
    assert (again["new"], again["samples"]) == (0, fresh["samples"])
    assert digests[0] == digests[1]


@pytest.mark.spark
def test_a_duplicate_of_a_forgotten_image_becomes_a_sample(run, leave, tmp_path):
    rows = {"a.png": ("Ada", "sick", 7), "b.png": ("Bob", "sick", 7), "c.png": ("Cyd", "well", 9)}
    samples = tmp_path / "samples"
    ingest(run, archive(tmp_path / "in", rows), samples)
    (kept,) = (row["patient_key"] for row in live(samples).values() if row["pixels"][0] == 7)

    leave(samples, kept)

    left = [row for row in live(samples).values() if row["pixels"][0] == 7]
    assert [row["patient_key"] != kept for row in left] == [True]


@pytest.mark.spark
def test_a_removal_that_fails_changes_nothing(run, leave, tmp_path, monkeypatch):
    samples = tmp_path / "samples"
    ingest(run, archive(tmp_path / "in", ROWS), samples)
    before, files = live(samples), set(samples.rglob("*.parquet"))

    def fail(*_: Any) -> None:
        raise OSError("no more disk")

    monkeypatch.setattr(forgetting._Removal, "_commit", fail)
    with pytest.raises(OSError, match="no more disk"):
        leave(samples, "Ada")

    assert live(samples) == before
    assert set(samples.rglob("*.parquet")) == files


@pytest.mark.spark
def test_a_dry_run_counts_and_changes_nothing_and_unknown_lines_are_named(run, leave, tmp_path):
    samples = tmp_path / "samples"
    ingest(run, archive(tmp_path / "in", ROWS), samples)
    before = live(samples)

    found = leave(samples, "Nobody", "Bob", "", "Eve", dry_run=True)

    assert (found["patients"], found["samples"], found["unknown_lines"]) == (1, 1, [1, 4])
    assert live(samples) == before


# --- without ---


def test_a_line_names_a_patient_by_identifier_or_by_key(tmp_path: Path) -> None:
    named = tmp_path / "patients.txt"
    named.write_text(f"Ada \n\n{KEY.patient('Bob')}\n", encoding="utf-8-sig")

    found = read_patients(named, KEY)

    assert found.unknown([KEY.patient("Ada"), KEY.patient("Bob")]) == []
    assert found.unknown([KEY.patient("Ada")]) == [3]


@pytest.mark.parametrize(
    ("content", "why"), [(b"\n \n", "names no patient"), (b"\xff\xfe\xff", "is not UTF-8 text")]
)
def test_a_file_that_names_nobody_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "patients.txt").write_bytes(content)

    with pytest.raises(UsageError, match=why):
        read_patients(tmp_path / "patients.txt", KEY)


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    config = ForgetConfig(samples=str(tmp_path), patients=tmp_path / "patients.txt")

    with pytest.raises(UsageError, match="holds no samples"):
        open_dataset(config)


def test_executors_that_hold_the_key_are_not_sent_it(tmp_path: Path, key_file: Path) -> None:
    samples = SampleSet(str(tmp_path / "samples"))
    privacy = Privacy(key_file=key_file, executor_key_file=key_file)
    key = load_key(privacy, dataset=samples.url)
    made = {"generation": "g", "previous": None, "digest": "", "counts": {}, "rendering": {}}
    files = {"parts": (), "ledger": (), "quarantine": ()}
    ownership.claim(samples.url, "samples")
    samples.commit(SamplesManifest(**made, **files, key_check=Pseudonyms(key).check))

    config = ForgetConfig(samples=samples.url, patients=tmp_path / "unused", privacy=privacy)

    assert key not in pickle.dumps(open_dataset(config).pseudonyms)
