"""--table of ingest and shard: what a dataset holds, and nothing private."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from key_files import write_key

from medspark.images.phantom import CANARY, CLASSES, PhantomConfig, write_archive

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SCHEMA = "spark_catalog.medspark_jobs"
SAMPLES, SHARDS = f"{SCHEMA}.samples", f"{SCHEMA}.shards"


@pytest.fixture(scope="module")
def published(
    spark: SparkSession, load_job: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder whose archive was ingested and cut, both with a table."""
    home = tmp_path_factory.mktemp("tables")
    spark.sql(f"CREATE SCHEMA {SCHEMA} LOCATION '{home}/warehouse'")
    write_archive(home / "in", PhantomConfig(count=60, size=32, seed=3))
    key = write_key(home / "key", "tables")
    run(load_job, home, "ingest", "--source", home / "in", "--labels", home / "in/labels.csv",
        "--privacy.key_file", key, "--samples", home / "samples", "--guarded", "false",
        "--image_size", 32,
        "--privacy.quarantine_file", home / "private.csv", "--table", SAMPLES)  # fmt: skip
    run(load_job, home, "shard", "--samples", home / "samples", "--shards", home / "shards",
        "--table", SHARDS)  # fmt: skip
    yield home
    spark.sql(f"DROP SCHEMA {SCHEMA} CASCADE")


def run(load_job: Any, home: Path, job: str, *words: object, status: int = 0) -> dict[str, Any]:
    output = home / f"{job}.json"
    assert load_job(job).main([*map(str, words), "--output", str(output)]) == status
    return dict(json.loads(output.read_text()))


def rows(spark: SparkSession, table: str) -> list[dict[str, Any]]:
    return [row.asDict() for row in spark.table(table).collect()]


@pytest.mark.spark
def test_the_table_of_an_ingest_has_a_row_for_each_sample(spark, published):
    result = json.loads((published / "ingest.json").read_text())
    found = rows(spark, SAMPLES)

    assert result["table"] == SAMPLES
    assert len({row["sample_key"] for row in found}) == len(found) == result["frames"]
    assert {row["label"] for row in found} == set(CLASSES)
    assert {(row["height"], row["width"], row["channels"]) for row in found} == {(32, 32, 1)}


@pytest.mark.spark
def test_the_table_of_shards_says_what_each_split_holds(spark, published):
    splits = json.loads((published / "shard.json").read_text())["splits"]
    found = rows(spark, SHARDS)

    counts = {
        name: tuple(sum(r["split"] == name and r["label"] == c for r in found) for c in CLASSES)
        for name in splits
    }
    assert counts == {name: tuple(split["class_counts"]) for name, split in splits.items()}
    by_sample = {row["sample_key"]: row for row in rows(spark, SAMPLES)}
    for row in found:
        sample = by_sample[row["sample_key"]]
        assert (row["patient_key"], row["label"]) == (sample["patient_key"], sample["label"])


@pytest.mark.spark
@pytest.mark.parametrize("table", [SAMPLES, SHARDS])
def test_nothing_private_is_in_a_table(spark, published, table):
    said = json.dumps(rows(spark, table))
    private = (published / "private.csv").read_text()
    ledger = next((published / "samples" / "ledger").rglob("*.parquet"))
    hidden = pq.read_table(ledger, columns=["file_key", "content_key", "fingerprint"])

    assert CANARY not in said
    assert str(published) not in said
    assert "parquet" not in said
    words = {cell for line in private.splitlines()[1:] for cell in line.split(",") if cell}
    assert words
    assert not any(word in said for word in words)
    assert not any(key in said for column in hidden.columns for key in column.to_pylist() if key)


@pytest.mark.spark
def test_a_table_of_others_ends_the_job_before_anything_is_written(
    spark, published, load_job, tmp_path, capsys
):
    other = f"{SCHEMA}.theirs"
    spark.sql(f"CREATE TABLE {other} USING parquet AS SELECT 7 AS id")
    words = ["--samples", published / "samples", "--shards", tmp_path / "shards", "--table", other]

    assert load_job("shard").main([*map(str, words), "--output", str(tmp_path / "o.json")]) == 2

    assert f"The table {other} exists and was not made by medspark" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()
    assert rows(spark, other) == [{"id": 7}]


@pytest.mark.spark
def test_findings_are_named_in_the_table(spark, published, write_shards):
    from medspark.sharding.shard_table import publish_shards
    from medspark.shards.manifest import read_manifest

    shards = write_shards(rows=8, findings=2)
    names = read_manifest(shards).classes

    publish_shards(spark, shards, f"{SCHEMA}.findings")

    labels = {row["label"] for row in rows(spark, f"{SCHEMA}.findings")}
    assert labels == {"", names[0], names[1], "|".join(names)}
