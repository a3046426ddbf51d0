"""Tables of the catalog: replaced whole, and only those that medspark made."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from medspark.errors import RunError, UsageError
from medspark.spark import table
from medspark.spark.table import MADE, TableConfig, check_table, publish

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SCHEMA = "spark_catalog.medspark_tables"
NAME = f"{SCHEMA}.images"
CONNECTED = """
import sys
from medspark.spark.cluster import is_connect
from medspark.spark.session import SparkConfig, spark_session
from medspark.spark.table import publish

with spark_session(SparkConfig(settings={"spark.sql.warehouse.dir": sys.argv[1]})) as spark:
    assert is_connect(spark)
    for count in (3, 5):
        publish(spark, spark.range(count), "spark_catalog.default.numbers", "samples")
        print(spark.table("spark_catalog.default.numbers").count())
"""


@pytest.fixture
def schema(spark: SparkSession, tmp_path: Path) -> Iterator[Path]:
    """An empty schema of Spark's own catalog; yields its folder."""
    spark.sql(f"CREATE SCHEMA {SCHEMA} LOCATION '{tmp_path}/warehouse'")
    yield tmp_path / "warehouse"
    spark.sql(f"DROP SCHEMA {SCHEMA} CASCADE")


def numbers(spark: SparkSession, name: str = NAME) -> list[int]:
    return sorted(row[0] for row in spark.table(name).select("id").collect())


@pytest.mark.spark
def test_a_table_is_replaced_whole_and_keeps_one_earlier_version_on_disk(spark, schema):
    for count in (3, 5, 2, 4):
        publish(spark, spark.range(count), NAME, "samples")
        assert numbers(spark) == list(range(count))

    (folder,) = schema.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


@pytest.mark.spark
def test_who_reads_while_a_table_is_replaced_gets_the_old_rows(spark, schema):
    publish(spark, spark.range(3), NAME, "samples")
    reading = spark.table(NAME)

    publish(spark, spark.range(5), NAME, "samples")

    assert reading.count() == 3
    assert numbers(spark) == list(range(5))


@pytest.mark.spark
def test_a_failed_publication_leaves_the_table_as_it_was(spark, schema):
    publish(spark, spark.range(3), NAME, "samples")
    broken = spark.range(5).selectExpr("raise_error('no more paper') AS id")

    with pytest.raises(RunError, match=f"but the table {NAME} was not written") as raised:
        publish(spark, broken, NAME, "samples")

    assert "\n" not in str(raised.value)
    assert numbers(spark) == [0, 1, 2]


@pytest.mark.spark
@pytest.mark.parametrize(
    ("kind", "said"), [("", "was not made by medspark"), ("shards", "shows shards, not samples")]
)
def test_a_table_of_others_is_refused_and_keeps_its_rows(spark, schema, kind, said):
    made = f"TBLPROPERTIES ('{MADE}' = '{kind}')" if kind else ""
    spark.sql(f"CREATE TABLE {NAME} USING parquet {made} AS SELECT 7L AS id")

    with pytest.raises(UsageError, match=said):
        publish(spark, spark.range(3), NAME, "samples")

    assert numbers(spark) == [7]


@pytest.mark.spark
def test_a_view_of_others_is_refused(spark, schema):
    spark.sql(f"CREATE VIEW {NAME} AS SELECT 7L AS id")

    with pytest.raises(UsageError, match="was not made by medspark"):
        check_table(spark, NAME, "samples")


@pytest.mark.spark
@pytest.mark.parametrize("missing", ["spark_catalog.nowhere.images", "nowhere.default.images"])
def test_a_schema_that_is_not_there_is_one_sentence(spark, missing):
    with pytest.raises(UsageError, match=missing) as raised:
        check_table(spark, missing, "samples")

    assert "\n" not in str(raised.value)


@pytest.mark.spark
def test_a_dropped_table_can_be_published_again(spark, schema):
    publish(spark, spark.range(3), NAME, "samples")
    spark.sql(f"DROP TABLE {NAME}")

    publish(spark, spark.range(2), NAME, "samples")

    assert numbers(spark) == [0, 1]


@pytest.mark.spark
def test_a_column_that_a_later_version_adds_appears_in_the_table(spark, schema):
    publish(spark, spark.range(3), NAME, "samples")

    publish(spark, spark.range(2).selectExpr("id", "'x' AS site"), NAME, "samples")

    assert [tuple(row) for row in spark.table(NAME).orderBy("id").collect()] == [(0, "x"), (1, "x")]


@pytest.mark.spark
def test_a_catalog_in_memory_is_announced(spark, schema, caplog):
    with caplog.at_level(logging.WARNING):
        publish(spark, spark.range(1), NAME, "samples")

    assert "ends with it" in caplog.text


class _Replaced:
    """A DataFrame that notes how another catalog would be asked to store it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __getattr__(self, verb: str) -> Any:
        def note(*told: str) -> _Replaced:
            self.asked.append((verb, *told))
            return self

        return note


@pytest.mark.spark
def test_another_catalog_replaces_in_one_step_and_chooses_its_format(spark, monkeypatch):
    monkeypatch.setattr(table, "check_table", lambda *_: True)
    rows: DataFrame = _Replaced()

    publish(spark, rows, "unity.images.ours", "shards")

    assert rows.asked == [
        ("writeTo", "`unity`.`images`.`ours`"), ("tableProperty", MADE, "shards"),
        ("createOrReplace",),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["images", "a.b", "a.b.c.d", "a..c", "a.b.c`", "a.b.c;d"])
def test_a_name_that_is_not_of_three_parts_is_refused(name):
    with pytest.raises(ValidationError, match=r"CATALOG\.SCHEMA\.NAME"):
        TableConfig(table=name)


@pytest.mark.spark
@pytest.mark.slow
def test_a_connect_session_publishes_too(tmp_path):
    pytest.importorskip("grpc")

    done = subprocess.run(
        [sys.executable, "-c", CONNECTED, str(tmp_path / "warehouse")],
        env=os.environ | {"SPARK_REMOTE": "local[2]"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "5"]
