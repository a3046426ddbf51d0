"""A dataset alone reveals no path, no name, and no link between them."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from private_archive import (
    KEPT_SITE,
    SECRETS,
    Runs,
    digests,
    image,
    leaks,
    put,
    shards_of,
)

from medspark.errors import UsageError
from medspark.ingest import pipeline
from medspark.sharding.build import open_samples
from medspark.sharding.config import ShardConfig
from medspark.shards.manifest import read_manifest

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.spark


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
