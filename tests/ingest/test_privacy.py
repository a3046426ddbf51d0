"""A dataset alone reveals no path, no name, and no link between them."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from key_files import write_key
from PIL import Image

from medspark.errors import RunError, UsageError
from medspark.images.deidentify import Pseudonyms
from medspark.images.frame import sha256_of
from medspark.ingest import ledger, pipeline
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.listing import Keyed
from medspark.ingest.pipeline import ingest
from medspark.ingest.sample_set import SampleSet, SamplesManifest
from medspark.ingest.sealing import _Unseal
from medspark.sharding.build import make_shards, open_samples
from medspark.sharding.config import ShardConfig
from medspark.shards.manifest import read_manifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

# Planted in typical places: a folder, file names, patients, sites, sessions.
SECRETS = ("DOE^JANE", "MRN-40718", "St Elsewhere")
KEPT_SITE = "Teaching Hospital"
LABELS = "path,label,patient_id,site\n"


def image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (np.arange(256).reshape(16, 16) + value) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(path, "PNG")


def put(folder: Path, number: int) -> Path:
    """Write an archive: eight images, a label conflict, a copy, a broken file, a label table."""
    lines = []
    for n in range(8):
        name = f"DOE^JANE/MRN-40718-{n}.png"
        image(folder / name, 16 * number + n)
        lines.append(
            f"{name},{'AB'[n % 2]},MRN-40718-{number}-{n},{(SECRETS[2], KEPT_SITE)[n % 2]}"
        )
    for name, label in (("DOE^JANE/torn.png", "A"), ("also-torn.png", "B"), ("copy.png", "A")):
        image(folder / name, 16 * number + (0 if name == "copy.png" else 200))
        lines.append(f"{name},{label},MRN-40718-{number}-{name},{SECRETS[2]}")
    (folder / "DOE^JANE" / "broken.png").write_bytes(b"")
    lines.append("DOE^JANE/broken.png,A,MRN-40718-9,")
    (folder / "labels.csv").write_text(LABELS + "\n".join(lines) + "\n")
    return folder


class Runs:
    """Ingests into one dataset."""

    def __init__(self, spark: SparkSession, folder: Path) -> None:
        self.spark, self.folder, self.samples = spark, folder, folder / "samples"
        self.list, self.key = folder / "list.csv", write_key(folder / "key", "privacy")
        self.pseudonyms = Pseudonyms(bytes.fromhex(self.key.read_text()))

    def __call__(self, source: Path, **values: Any) -> dict[str, Any]:
        config = {
            "source": str(source),
            "samples": str(self.samples),
            "labels": str(source / "labels.csv"),
            "image_size": 16,
            "guarded": False,
            "privacy": {
                "key_file": self.key, "quarantine_file": self.list, "sites": [KEPT_SITE],
            },
        }  # fmt: skip
        return ingest(self.spark, open_archive(IngestConfig.model_validate(config | values)))

    def manifest(self) -> SamplesManifest:
        manifest = SampleSet(str(self.samples)).manifest()
        assert manifest
        return manifest

    def rows(self, kind: str) -> list[dict[str, Any]]:
        files = getattr(self.manifest(), kind)
        return [row for name in files for row in pq.read_table(self.samples / name).to_pylist()]

    def listed(self) -> dict[str, str]:
        with self.list.open(encoding="utf-8", newline="") as file:
            return {row["path"]: row["file_key"] for row in csv.DictReader(file)}


@pytest.fixture
def runs(spark: SparkSession, tmp_path: Path) -> Runs:
    return Runs(spark, tmp_path)


def everything(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the bytes of all files, names included, and the values of tables with their footers."""
    for path in folder.rglob("*"):
        yield path, str(path.relative_to(folder)).encode()
        if path.is_file():
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                told = pq.read_table(path).to_pydict(), pq.read_metadata(path).to_dict()
                yield path, repr(told).encode()


def leaks(folder: Path, *secrets: str) -> list[str]:
    """Return the files that contain one of ``secrets``."""
    return [
        f"{secret} in {path}"
        for path, content in everything(folder)
        for secret in secrets
        if secret.encode() in content
    ]


def digests(source: Path) -> list[str]:
    """Return the digests that can be computed from the files: SHA-256 of bytes and of pixels."""
    files = list(source.rglob("*.png"))
    whole = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return whole + [pixels_of(path) for path in files if path.stat().st_size]


def pixels_of(path: Path) -> str:
    return sha256_of(np.asarray(Image.open(path)), "MONOCHROME2")


def test_no_planted_name_and_no_digest_of_a_file_is_in_dataset_result_or_log(
    runs, tmp_path, caplog, capfd
):
    source = put(tmp_path / "in", 0)

    with caplog.at_level(logging.DEBUG):
        result = runs(source)

    assert (result["samples"], result["duplicates"], result["quarantined"]) == (8, 1, 3)
    assert leaks(runs.samples, *SECRETS, "torn.png", "broken", *digests(source)) == []
    printed = capfd.readouterr()
    said = f"{caplog.text} {printed.out} {printed.err} {json.dumps(result)}"
    assert [secret for secret in SECRETS if secret in said] == []
    assert result["quarantine_file"] == str(runs.list)
    sites = {row["site"] for row in runs.rows("ledger") if row["outcome"] == "sample"}
    assert sites == {KEPT_SITE, runs.pseudonyms.name("site", SECRETS[2])}


def test_nothing_joins_the_quarantine_or_the_list_to_a_patient(runs, tmp_path):
    runs(put(tmp_path / "in", 0))

    known_files, quarantine, listed = runs.rows("ledger"), runs.rows("quarantine"), runs.listed()

    assert [set(row) for row in quarantine] == [{"reason", "message"}] * 3
    torn = [row for row in known_files if row["reason"] == "conflicting_label"]
    assert len(torn) == 2
    parts = [pq.read_table(runs.samples / part.path) for part in runs.manifest().parts]
    rows = [row for part in parts for row in part.drop_columns(["pixels"]).to_pylist()]
    known = {value for row in rows for name, value in row.items() if name.endswith("_key")}
    for row in torn:
        assert row["patient_key"] is row["sample_key"] is row["part"] is row["row"] is None
        assert not (known & set(row.values())) - {None}
    assert {row["file_key"] for row in torn} < set(listed.values())
    names = ("DOE^JANE/torn.png", "also-torn.png", "DOE^JANE/broken.png")
    assert set(listed) == {f"{tmp_path}/in/{name}" for name in names}


def test_a_contradiction_that_is_mended_is_a_sample_again_without_decoding(
    runs, tmp_path, monkeypatch
):
    source = put(tmp_path / "in", 0)
    runs(source)
    (source / "also-torn.png").unlink()

    result = runs(source)

    assert (result["changed"], result["added"], result["samples"]) == (0, 1, 9)
    assert runs.manifest().sealed == 0
    assert set(runs.listed()) == {f"{source}/DOE^JANE/broken.png"}
    (row,) = [r for r in runs.rows("ledger") if r["file_key"] == _key(runs, source, "torn.png")]
    assert row["patient_key"] == runs.pseudonyms.patient("MRN-40718-0-DOE^JANE/torn.png")
    assert row["part"] in {part.path for part in runs.manifest().parts}


def _key(runs: Runs, source: Path, name: str) -> str:
    return runs.pseudonyms.name("file", f"{source}/DOE^JANE/{name}")


def test_archives_keep_each_others_rows_and_a_lost_list_comes_back(runs, tmp_path, caplog):
    one, two = put(tmp_path / "one", 0), put(tmp_path / "two", 1)
    runs(one)
    first = set(runs.listed())
    runs(two)
    both = set(runs.listed())

    runs.list.unlink()
    runs(two)
    second, said = set(runs.listed()), caplog.text
    runs(one)

    assert first | second == both == set(runs.listed())
    assert not first & second
    assert f"3 quarantined files are missing from {runs.list}" in said


def test_a_site_that_is_allowed_or_not_any_more_is_kept_the_other_way(runs, tmp_path):
    source = put(tmp_path / "in", 0)
    runs(source)
    privacy = {"key_file": runs.key, "quarantine_file": runs.list}

    result = runs(source, privacy=privacy | {"sites": [SECRETS[2]]})
    again = runs(source, privacy=privacy | {"sites": [SECRETS[2]]})

    assert (result["added"], result["removed"], again["changed"]) == (0, 0, 0)
    sites = {row["site"] for row in runs.rows("ledger") if row["outcome"] == "sample"}
    assert sites == {SECRETS[2], runs.pseudonyms.name("site", KEPT_SITE)}


class _Killed(BaseException):
    """Stands for SIGKILL: code that catches Exception does not catch it."""


@pytest.fixture
def killed(runs, tmp_path, monkeypatch) -> Runs:
    """Return a dataset in which an ingest was killed after staging all rows."""

    def die(*_: object) -> None:
        shutil.copytree(runs.samples / "staging", tmp_path / "staged")
        raise _Killed

    source = put(tmp_path / "in", 0)
    runs(source)
    image(source / "new.png", 100)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(pipeline._Ingest, "_commit", die)
        runs(source)
    shutil.move(tmp_path / "staged", runs.samples / "staging")
    assert (runs.samples / "staging" / "outcomes").exists()
    return runs


def test_what_a_killed_ingest_staged_names_nobody(killed):
    assert leaks(killed.samples, *SECRETS, "torn.png", "new.png", "labels.csv") == []


@pytest.mark.parametrize("job", ["ingest", "dry run", "shard"])
def test_the_next_job_of_any_kind_clears_what_a_killed_one_staged(killed, tmp_path, job):
    if job == "shard":
        config = {"samples": str(killed.samples), "shards": tmp_path / "shards"}
        open_samples(ShardConfig.model_validate(config))
    else:
        killed(tmp_path / "in", dry_run=job == "dry run")

    assert not (killed.samples / "staging").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_folder_per_patient_is_no_class(runs, tmp_path, dry_run):
    for number in range(5):
        image(tmp_path / "in" / "train" / f"DOE^JANE-{number}" / "x.png", number)

    with pytest.raises(UsageError, match=r"5 class folders, more than max_classes \(4\)") as caught:
        runs(tmp_path / "in", labels=None, max_classes=4, dry_run=dry_run)
    assert leaks(runs.samples, *SECRETS) == []
    assert "--labels" in str(caught.value)
    assert "DOE" not in str(caught.value)
    assert runs(tmp_path / "in", labels=None, max_classes=5)["samples"] == 5


# --- datasets of an earlier version -----------------------------------------------------------


_DIGESTS = {"content_key": "sha256", "pixel_key": "pixel_sha256"}
_FORMER = pa.schema(
    [f.with_name(_DIGESTS.get(f.name, f.name)) for f in ledger.SCHEMA if f.name != "sealed"]
)


def downgrade(runs: Runs, *sources: Path) -> None:
    """Change the dataset to schema version 2: plain digests, site names, and paths."""
    names, samples = runs.pseudonyms, runs.samples
    sites = {names.name("site", site): site for site in (SECRETS[2],)}
    paths = {
        Keyed(str(source), names).row({"path": name, "size": 0, "modified": 0})["file_key"]: (
            source, name)
        for source in sources
        for name in (str(path.relative_to(source)) for path in source.rglob("*.png"))
    }  # fmt: skip
    record = runs.manifest().model_dump(mode="json", exclude={"sealed"}) | {"schema_version": 2}
    bad = []
    for file in record["ledger"]:
        table = pq.read_table(samples / file)
        rows = [_Unseal(names)._row(r) if r["sealed"] else r for r in table.to_pylist()]
        for row in rows:
            source, name = paths[row["file_key"]]
            content = hashlib.sha256((source / name).read_bytes()).hexdigest()
            row["sha256"] = content if row.pop("content_key") else None
            row["pixel_sha256"] = pixels_of(source / name) if row.pop("pixel_key") else None
            row["site"] = sites.get(row["site"], row["site"])
            if row["outcome"] == "quarantined":
                keys = ("reason", "message", "size", "sha256", "file_key", "source_key")
                bad.append({"path": name, **{key: row[key] for key in keys}})
            del row["sealed"]
        pq.write_table(pa.Table.from_pylist(rows, schema=_FORMER), samples / file)
    for number, file in enumerate(record["quarantine"]):
        table = pa.Table.from_pylist(bad)
        pq.write_table(table.slice(0, None if number == 0 else 0), samples / file)
    for part in record["parts"]:
        table = pq.read_table(samples / part["path"])
        cells = [sites.get(site, site) for site in table["site"].to_pylist()]
        table = table.set_column(table.schema.get_field_index("site"), "site", [cells])
        spacings = pa.array([0.123456789] * len(table))
        at = table.schema.get_field_index("row_spacing_mm")
        table = table.set_column(at, "row_spacing_mm", spacings)
        table = table.append_column("pixel_sha256", pa.array(["f" * 64] * len(table)))
        pq.write_table(table, samples / part["path"], compression="zstd")
        content = (samples / part["path"]).read_bytes()
        part |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (samples / "manifest.json").write_text(json.dumps(record))


@pytest.fixture
def former(runs, tmp_path) -> Runs:
    """Return a dataset of version 2 from two archives, without a private list."""
    one, two = put(tmp_path / "one", 0), put(tmp_path / "two", 1)
    runs(one)
    runs(two)
    downgrade(runs, one, two)
    runs.list.unlink()
    assert leaks(runs.samples, *SECRETS) != []
    return runs


def live(runs: Runs) -> dict[str, bytes]:
    parts = {p.path: pq.read_table(runs.samples / p.path) for p in runs.manifest().parts}
    rows = [row for row in runs.rows("ledger") if row["outcome"] == "sample"]
    return {r["sample_key"]: parts[r["part"]]["pixels"][r["row"]].as_py() for r in rows}


def test_the_next_ingest_makes_an_old_dataset_one_of_this_version_without_decoding(
    former, tmp_path, monkeypatch
):
    before = live(former)

    result = former(tmp_path / "one")

    assert (result["added"], result["removed"], result["changed"], result["new"]) == (0, 0, 0, 0)
    assert (result["samples"], result["duplicates"], result["quarantined"]) == (8, 1, 3)
    assert live(former) == before
    assert former.manifest().schema_version == 3
    secrets = [*SECRETS, "broken", *digests(tmp_path / "one"), *digests(tmp_path / "two"), "f" * 64]
    assert leaks(former.samples, *secrets) == []
    spacings = {row["row_spacing_mm"] for part in former.manifest().parts
                for row in pq.read_table(former.samples / part.path).to_pylist()}  # fmt: skip
    assert spacings == {0.123}
    # The other archive's quarantined files are listed from the old version's table.
    assert len(former.listed()) == 6
    manifest = (former.samples / "manifest.json").read_bytes()
    for source in ("one", "two"):
        again = former(tmp_path / source)
        assert (again["added"], again["unchanged"]) == (0, result["files_seen"])
    assert (former.samples / "manifest.json").read_bytes() == manifest


def test_a_dry_run_of_an_old_dataset_changes_nothing_and_finds_all_of_it_unchanged(
    former, tmp_path
):
    before = (former.samples / "manifest.json").read_bytes()

    result = former(tmp_path / "one", dry_run=True)

    assert (result["unchanged"], result["files_seen"]) == (12, 12)
    assert (former.samples / "manifest.json").read_bytes() == before
    assert not former.list.exists()


def test_a_damaged_part_of_an_old_dataset_is_not_made_good(former, tmp_path):
    part = former.samples / former.manifest().parts[0].path
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)

    with pytest.raises(RunError, match="has been damaged"):
        former(tmp_path / "one")
    assert former.manifest().schema_version == 2


def shards_of(runs: Runs, folder: Path) -> dict[str, Any]:
    """Write shards, and return their rows by sample key."""
    values = {"samples": str(runs.samples), "shards": folder, "split": {"test": 0.4}}
    config = ShardConfig.model_validate(values)
    make_shards(runs.spark, config, open_samples(config))
    rows = [row for path in folder.rglob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["sample_key"]: row for row in rows}


def test_shards_are_made_of_an_old_dataset_as_of_a_new_one_but_for_sites(former, tmp_path):
    old = shards_of(former, tmp_path / "old")
    former(tmp_path / "two")
    new = shards_of(former, tmp_path / "new")

    assert {row["site"] for row in old.values()} == {None}
    assert leaks(tmp_path / "old", *SECRETS) == []
    assert {key: row | {"site": None} for key, row in new.items()} == old


def test_shards_know_sites_by_pseudonym_or_allowed_name_and_name_nobody(runs, tmp_path, caplog):
    runs(put(tmp_path / "in", 0))

    with caplog.at_level(logging.DEBUG):
        rows = shards_of(runs, tmp_path / "shards")

    sites = {row["sample_key"]: row["site"] for row in runs.rows("ledger") if row["sample_key"]}
    assert {key: row["site"] for key, row in rows.items()} == {key: sites[key] for key in rows}
    counted = Counter[str]()
    for split in read_manifest(tmp_path / "shards").splits.values():
        counted.update(split.sites)
    assert counted == {KEPT_SITE: 4, runs.pseudonyms.name("site", SECRETS[2]): 4}
    assert leaks(tmp_path / "shards", *SECRETS, *digests(tmp_path / "in")) == []
    assert [secret for secret in SECRETS if secret in caplog.text] == []
