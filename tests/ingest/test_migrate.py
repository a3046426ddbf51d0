"""Migration of a dataset of an earlier version, row by row and part by part."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import RunError
from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.ingest import ledger
from medspark.ingest.migrate import Migration, _RenewParts
from medspark.ingest.parts import SAMPLE_SCHEMA, Part

PSEUDONYMS = Pseudonyms(b"k" * 32)
MIGRATION = Migration("new", PSEUDONYMS, Privacy(sites=("kept",)))
TEXT = st.none() | st.text(min_size=1)


@given(
    row=st.fixed_dictionaries(
        {"content_key": TEXT, "pixel_key": TEXT, "site": TEXT | st.just("kept"), "label": TEXT}
    )
)
def test_a_row_of_the_ledger_keeps_everything_but_digests_sites_and_where_its_part_is(
    row: dict[str, Any],
) -> None:
    old = dict.fromkeys(ledger.SCHEMA.names) | row | {"part": "data/old/x.parquet", "row": 3}

    new = MIGRATION._ledger_row(old)

    digests = {"content_key": PSEUDONYMS.content, "pixel_key": PSEUDONYMS.pixels}
    expected = {name: row[name] and make(row[name]) for name, make in digests.items()}
    site = row["site"] and MIGRATION.privacy.site(row["site"], PSEUDONYMS)
    assert new == old | expected | {"site": site, "part": "data/new/x.parquet"}


def old_part(folder: Path, rows: int, group: int) -> Part:
    """Write a part of version 2: with pixel_sha256, site names, and exact spacings."""
    values = {"string": "x", "int32": 1, "int64": 1, "double": 1.0, "bool": True}
    known = {name: values[str(SAMPLE_SCHEMA.field(name).type)]
             for name in SAMPLE_SCHEMA.names if name != "pixels"}  # fmt: skip
    told = [known | {"sample_key": f"s{n}", "pixels": bytes([n]), "site": ("kept", "Clinic")[n % 2],
                     "row_spacing_mm": 0.1234567891, "pixel_sha256": f"{n:064x}"}
            for n in range(rows)]  # fmt: skip
    path = folder / "data" / "old" / "x.parquet"
    path.parent.mkdir(parents=True)
    schema = pa.schema([*SAMPLE_SCHEMA, ("pixel_sha256", pa.string())])
    pq.write_table(pa.Table.from_pylist(told, schema=schema), path, row_group_size=group)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Part(path="data/old/x.parquet", rows=rows, bytes=len(content), sha256=digest)


def renewed(folder: Path, part: Part) -> Part:
    (batch,) = _RenewParts(MIGRATION, str(folder))([pa.RecordBatch.from_pylist([dict(part)])])
    return Part.model_validate(batch.to_pylist()[0])


def test_a_part_is_written_anew_row_for_row_in_its_groups(tmp_path: Path) -> None:
    new = renewed(tmp_path, old_part(tmp_path, rows=7, group=3))

    path = tmp_path / new.path
    table = pq.read_table(path)
    assert (new.path, new.rows) == ("data/new/x.parquet", 7)
    assert (new.bytes, new.sha256) == (
        path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(),
    )  # fmt: skip
    assert pq.read_metadata(path).num_row_groups == 3
    assert table.schema.names == SAMPLE_SCHEMA.names
    assert table["sample_key"].to_pylist() == [f"s{n}" for n in range(7)]
    assert table["pixels"].to_pylist() == [bytes([n]) for n in range(7)]
    assert set(table["row_spacing_mm"].to_pylist()) == {0.123}
    assert table["site"].to_pylist()[:2] == ["kept", PSEUDONYMS.name("site", "Clinic")]


@pytest.mark.parametrize(("damage", "said"), [("bit", "damaged"), ("cut", "another size")])
def test_a_part_that_is_not_what_its_digest_says_is_not_made_good(
    tmp_path: Path, damage: str, said: str
) -> None:
    part = old_part(tmp_path, rows=2, group=2)
    content = bytearray((tmp_path / part.path).read_bytes())
    content[9] ^= 1
    (tmp_path / part.path).write_bytes(content if damage == "bit" else content[:-1])

    with pytest.raises(RunError, match=said):
        renewed(tmp_path, part)
    assert not (tmp_path / "data" / "new").exists()
