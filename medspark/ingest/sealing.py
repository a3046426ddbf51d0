"""Seal ledger rows that have conflicting labels: hide patient, label, site and part.

The quarantine list names the files of these rows, so the ledger must not link them to a patient.
Once the conflict is resolved, the row becomes a sample again and needs the hidden columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from medspark.images.deidentify import Pseudonyms
from medspark.ingest import ledger
from medspark.spark.task import map_batches

_HIDDEN = ("sample_key", "patient_key", "label", "split", "site", "part", "row")


def seal_conflicts(rows: pa.Table, pseudonyms: Pseudonyms) -> pa.Table:
    """Return ``rows`` of ledger.SCHEMA, reordered, with all rows of conflicting labels sealed."""
    conflict = pc.equal(rows["reason"], ledger.CONFLICTING_LABEL)
    chosen = pc.fill_null(pc.and_(conflict, pc.is_valid(rows["sample_key"])), False)
    sealed = rows.filter(chosen).to_pylist()
    if not sealed:
        return rows
    for row in sealed:
        text = json.dumps([row[name] for name in _HIDDEN])
        row |= dict.fromkeys(_HIDDEN) | {"sealed": pseudonyms.seal(text)}
    hidden = pa.Table.from_pylist(sealed, schema=rows.schema)
    return pa.concat_tables([rows.filter(pc.invert(chosen)), hidden])


def unsealed(rows: DataFrame, pseudonyms: Pseudonyms) -> DataFrame:
    """Return the ledger's ``rows`` with all sealed rows opened."""
    hidden = rows.where(F.col("sealed").isNotNull())
    opened = map_batches(hidden, _Unseal(pseudonyms), rows.schema)
    return rows.where(F.col("sealed").isNull()).unionByName(opened)


@dataclass(frozen=True)
class _Unseal:
    pseudonyms: Pseudonyms

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = [self._row(row) for row in batch.to_pylist()]
            yield pa.RecordBatch.from_pylist(rows, schema=batch.schema)

    def _row(self, row: dict[str, object]) -> dict[str, object]:
        values = json.loads(self.pseudonyms.unseal(str(row["sealed"])))
        return row | dict(zip(_HIDDEN, values, strict=True)) | {"sealed": None}
