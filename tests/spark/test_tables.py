"""Tables of Parquet files, by Spark on a file system and by its tasks in an object store."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql.pandas.types import from_arrow_schema

from medspark import storage
from medspark.spark.tables import read_files, read_foreign, staged, write_files

pytestmark = pytest.mark.spark

SCHEMA = from_arrow_schema(
    pa.schema(
        [
            ("name", pa.string()),
            ("number", pa.int64()),
            ("shares", pa.map_(pa.string(), pa.float64())),
        ]
    )
)


@pytest.fixture(params=["file system", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_spark, bucket: str) -> str:
    return str(tmp_path / "t") if request.param == "file system" else f"{bucket}/t"


def test_staged_rows_come_back_as_they_were(s3_spark, place):
    rows = [("a", 1, {"x": 0.5}), (None, 2, None), ("c", None, {})]
    table = s3_spark.createDataFrame(rows, SCHEMA)

    back = staged(table, place)

    assert back.schema == SCHEMA
    assert sorted(map(tuple, back.collect()), key=str) == sorted(rows, key=str)


def test_no_rows_are_a_table_too(s3_spark, place):
    back = staged(s3_spark.createDataFrame([], SCHEMA), place)

    assert back.schema == SCHEMA
    assert back.collect() == []


def test_no_files_are_no_rows(s3_spark):
    assert read_files(s3_spark, [], SCHEMA).collect() == []


def test_columns_that_older_files_lack_are_null_and_others_are_left_out(s3_spark, place):
    files = []
    for number, names in enumerate((["name", "number"], ["name", "other"])):
        url = storage.join(place, f"{number}.parquet")
        system, path = storage.filesystem(url)
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        values = {name: pa.array([number]) for name in names} | {"name": [f"n{number}"]}
        pq.write_table(pa.table(values), path, filesystem=system)
        files.append(url)

    wanted = from_arrow_schema(pa.schema([("name", pa.string()), ("number", pa.int64())]))
    rows = read_files(s3_spark, files, wanted)

    assert sorted(map(tuple, rows.collect())) == [("n0", 0), ("n1", None)]


def test_files_of_a_store_that_no_task_reported_are_not_in_the_table(s3_spark, bucket):
    table = s3_spark.range(10).toDF("number")
    files = write_files(table, f"{bucket}/t")
    assert files is not None
    write_files(table, f"{bucket}/t")  # what a task leaves that runs twice

    rows = read_files(s3_spark, files, table.schema)

    assert sorted(row["number"] for row in rows.collect()) == list(range(10))


@pytest.mark.parametrize("kind", ["x.csv", "x.parquet", "folder/"])
def test_a_table_of_somebody_else_is_read(s3_spark, place, kind):
    table = pa.table({"path": ["a", "b"], "size": ["1", "2"]})
    url = storage.join(place, kind)
    file = storage.join(url, "part.parquet") if kind.endswith("/") else url
    storage.make_folder(file.rpartition("/")[0])
    if kind.endswith(".csv"):
        storage.write_text(file, "path,size\na,1\nb,2\n")
    else:
        system, path = storage.filesystem(file)
        pq.write_table(table, path, filesystem=system)

    rows = read_foreign(s3_spark, url)

    assert rows.columns == ["path", "size"]
    assert sorted(map(tuple, rows.collect())) == [("a", "1"), ("b", "2")]
