"""Datasets of earlier versions: the next ingest migrates them and decodes nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from private_archive import (
    SECRETS,
    Runs,
    digests,
    leaks,
    pixels_of,
    put,
    shards_of,
)

from medspark.errors import RunError
from medspark.ingest import ledger
from medspark.ingest.listing import Keyed
from medspark.ingest.sample_set import SCHEMA_VERSION
from medspark.ingest.sealing import _Unseal

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.spark


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
    assert former.manifest().schema_version == SCHEMA_VERSION
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


def test_shards_are_made_of_an_old_dataset_as_of_a_new_one_but_for_sites(former, tmp_path):
    old = shards_of(former, tmp_path / "old")
    former(tmp_path / "two")
    new = shards_of(former, tmp_path / "new")

    assert {row["site"] for row in old.values()} == {None}
    assert leaks(tmp_path / "old", *SECRETS) == []
    assert {key: row | {"site": None} for key, row in new.items()} == old
