"""Publish rows as a table of the session's catalog; every publication replaces the table whole.

A table says in a property that medspark made it, and of what. No other table is ever replaced.
DataFrames and SQL do everything, so that it works on Connect sessions too.

Catalogs with transactions (Unity Catalog, Delta, Iceberg) replace a table in one step and store it
in their default format. Spark's own catalog cannot: there the rows lie in one of two folders of
Parquet files. A publication writes the other folder and then points the table to it.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession

from medspark.config import Config
from medspark.errors import RunError, UsageError
from medspark.spark.cluster import setting

__all__ = ["TableConfig", "check_table", "publish"]

_LOGGER = logging.getLogger(__name__)

Kind = Literal["samples", "shards"]

# The table property that tells of what dataset medspark made the table.
MADE = "medspark.table"
_SPARKS_OWN = "spark_catalog"
_PART = re.compile(r"[\w-]+")


def _named(name: str) -> str:
    parts = name.split(".")
    if len(parts) != 3 or not all(map(_PART.fullmatch, parts)):
        raise ValueError(
            f"{name!r} should be CATALOG.SCHEMA.NAME, each of letters, digits, _ and -"
        )
    return name


class TableConfig(Config):
    """The table that a job publishes."""

    table: Annotated[str, AfterValidator(_named)] | None = Field(
        None,
        description="CATALOG.SCHEMA.NAME of a table to publish, with a row a sample and without "
        "pixels; a table that an earlier run published is replaced whole",
    )


def check_table(spark: SparkSession, name: str, kind: Kind) -> bool:
    """Return whether the table ``name`` exists and may be replaced; False if there is none.

    Raises UsageError if its schema is missing, medspark did not make it, or it shows another kind
    of dataset.
    """
    try:
        schema = _quoted(name.rpartition(".")[0])
        if not spark.catalog.databaseExists(schema):
            raise UsageError(f"There is no schema for the table {name}: create {schema} first.")
        if not spark.catalog.tableExists(_quoted(name)):
            return False
        made = _properties(spark, name).get(MADE)
    except AnalysisException as error:
        raise UsageError(f"The table {name} cannot be looked up: {_first_line(error)}") from None
    if made is None:
        raise UsageError(
            f"The table {name} exists and was not made by medspark: give --table another name."
        )
    if made != kind:
        raise UsageError(f"The table {name} shows {made}, not {kind}: give --table another name.")
    return True


def publish(spark: SparkSession, rows: DataFrame, name: str, kind: Kind) -> None:
    """Make ``rows`` the content of the table ``name``: readers see the old rows or the new ones.

    Raises UsageError as check_table does, and RunError if the table cannot be written.
    """
    exists = check_table(spark, name, kind)
    with _said(name):
        if not _is_sparks_own(spark, name):
            rows.writeTo(_quoted(name)).tableProperty(MADE, kind).createOrReplace()
        elif exists:
            _swap(spark, rows, name)
        else:
            _create(spark, rows, name, kind)


# --- Spark's own catalog ---


def _is_sparks_own(spark: SparkSession, name: str) -> bool:
    catalog = name.partition(".")[0]
    chosen = setting(spark, f"spark.sql.catalog.{_SPARKS_OWN}", "builtin")
    return catalog == _SPARKS_OWN and chosen == "builtin"


def _create(spark: SparkSession, rows: DataFrame, name: str, kind: Kind) -> None:
    if setting(spark, "spark.sql.catalogImplementation", "in-memory") == "in-memory":
        _LOGGER.warning("this session keeps its catalog in memory: %s ends with it", name)
    schema, _, table = name.rpartition(".")
    folder = spark.catalog.getDatabase(_quoted(schema)).locationUri.rstrip("/")
    # A name that nobody else has: a dropped table leaves its files.
    place = f"{folder}/{table}-{secrets.token_hex(4)}/a"
    rows.write.parquet(place)
    spark.sql(
        f"CREATE TABLE {_quoted(name)} ({_columns(rows)}) USING parquet "
        f"LOCATION {_text(place)} TBLPROPERTIES ({_text(MADE)} = {_text(kind)})"
    )


def _swap(spark: SparkSession, rows: DataFrame, name: str) -> None:
    """Write the folder that the table does not use, and point the table to it."""
    described = spark.sql(f"DESCRIBE TABLE EXTENDED {_quoted(name)}").collect()
    used = next(row["data_type"] for row in described if row["col_name"] == "Location")
    folder, _, letter = used.rstrip("/").rpartition("/")
    place = f"{folder}/{'b' if letter == 'a' else 'a'}"
    rows.write.mode("overwrite").parquet(place)
    known = set(spark.table(_quoted(name)).columns)
    added = rows.select([column for column in rows.columns if column not in known])
    if added.columns:  # another version of medspark made the table
        spark.sql(f"ALTER TABLE {_quoted(name)} ADD COLUMNS ({_columns(added)})")
    spark.sql(f"ALTER TABLE {_quoted(name)} SET LOCATION {_text(place)}")


# --- names and errors ---


def _properties(spark: SparkSession, name: str) -> dict[str, str]:
    rows = spark.sql(f"SHOW TBLPROPERTIES {_quoted(name)}").collect()
    return {row["key"]: row["value"] for row in rows}


def _quoted(name: str) -> str:
    return ".".join(f"`{part}`" for part in name.split("."))


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _columns(rows: DataFrame) -> str:
    return ", ".join(f"`{field.name}` {field.dataType.simpleString()}" for field in rows.schema)


@contextmanager
def _said(name: str) -> Iterator[None]:
    """Turn an error of Spark into a RunError of one line."""
    try:
        yield
    except PySparkException as error:
        raise RunError(
            f"The dataset is complete, but the table {name} was not written: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
