"""Which of equal images becomes the sample, compared with a model in plain Python."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from medspark.ingest import ledger
from medspark.storage import OUTSIDE

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

_ROWS = pa.schema([*ledger.SCHEMA, ("sealed_path", pa.string()), ("present", pa.bool_())])
_HINTS = ["test", "val", "train", None]


def copies(image: int, chance: random.Random, *, standing: bool) -> list[dict[str, Any]]:
    """Return the rows of files that show the same image; one row may be a sample already."""
    rows = []
    for number in range(chance.randint(1, 6)):
        # A file's key also depends on where the archive lies; it decides nothing.
        key, of_file = (f"{chance.randrange(16**8):08x}" for _ in range(2))
        known = {
            "file_key": of_file, "sample_key": f"s-{key}", "patient_key": f"p{chance.randrange(3)}",
            "frame": 1, "pixel_key": f"x{image}", "label": "A", "split": chance.choice(_HINTS),
            "outcome": "sample" if standing and number == 0 else "candidate", "present": True,
        }  # fmt: skip
        rows.append(dict.fromkeys(_ROWS.names) | known)
    if image % 7 == 0 and len(rows) > 1:
        rows[-1]["label"] = "B"
    return rows


def first_of(rows: list[dict[str, Any]]) -> str | None:
    """Return the sample_key of the copy that becomes the sample, by the model."""
    if len({row["label"] for row in rows}) > 1:
        return None
    ranked = [(r["outcome"] != "sample", _HINTS.index(r["split"]), r["sample_key"]) for r in rows]
    return str(rows[ranked.index(min(ranked))]["sample_key"])


def settled(spark: SparkSession, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    table = spark.createDataFrame(pa.Table.from_pylist(rows, schema=_ROWS))
    return [row.asDict() for row in ledger.settle(table).collect()]


def test_of_equal_images_the_standing_sample_stays_else_the_most_held_out_is_taken(spark) -> None:
    chance = random.Random(0)
    images = [copies(image, chance, standing=image % 2 == 0) for image in range(120)]
    rows = [row for image in images for row in image]
    chance.shuffle(rows)

    found = settled(spark, rows)

    expected = {first_of(image) for image in images} - {None}
    assert {row["sample_key"] for row in found if row["outcome"] == "sample"} == expected
    by_key = {row["sample_key"]: row for row in found}
    for image in images:
        kept = first_of(image)
        for row in (by_key[copy["sample_key"]] for copy in image):
            if kept is None:
                assert (row["outcome"], row["reason"]) == ("quarantined", "conflicting_label")
            elif row["sample_key"] != kept:
                assert (row["outcome"], row["duplicate_of"]) == ("duplicate", kept)


def test_later_copies_never_take_the_place_of_a_sample_again_and_again(spark) -> None:
    chance = random.Random(1)
    rows = [copies(1, chance, standing=True)[0]]
    first = rows[0]["sample_key"]
    for _ in range(2):
        late = [copies(1, chance, standing=False)[0] for _ in range(20)]
        for row in late:  # whatever would speak for a copy: held out, an early key
            row |= {"split": "test", "sample_key": f"0{row['sample_key']}", "label": "A"}
        rows = settled(spark, rows + late)
        samples = [row["sample_key"] for row in rows if row["outcome"] == "sample"]
        rows = [{name: row[name] for name in _ROWS.names} for row in rows]

        assert samples == [first]


@pytest.mark.parametrize(
    ("known", "now", "status"),
    [
        ({"fingerprint": "f", "site": "s"}, {"fingerprint": "f", "site": "s"}, "unchanged"),
        ({"fingerprint": "f", "site": None}, {"fingerprint": "f", "site": "s"}, "unchanged"),
        ({"fingerprint": "f", "site": "s"}, {"fingerprint": "f", "site": "t"}, "changed"),
        ({"fingerprint": "f", "site": "s"}, {"fingerprint": "f", "site": None}, "changed"),
        ({"fingerprint": "f", "site": "s"}, {"fingerprint": "g", "site": "s"}, "changed"),
        (None, {"fingerprint": "f", "site": "s"}, "new"),
        ({"outcome": "sample"}, {"fingerprint": "g", "site": "s", "size": OUTSIDE}, "unchanged"),
        ({"outcome": "duplicate"}, {"fingerprint": "g", "site": "s", "size": OUTSIDE}, "changed"),
        ({"outcome": "sample"}, None, "deleted"),
        ({"outcome": "duplicate"}, None, "forgotten"),
    ],
)
def test_a_file_is_compared_by_its_fingerprint_and_how_its_site_is_kept(
    spark, known, now, status
) -> None:
    schema = "file_key string, fingerprint string, site string, size long"
    files = [] if now is None else [("a", now["fingerprint"], now["site"], now.get("size", 9))]
    rows = [] if known is None else [dict.fromkeys(_ROWS.names) | {"file_key": "a",
            "fingerprint": "f", "outcome": "sample", **known}]  # fmt: skip
    before = spark.createDataFrame(pa.Table.from_pylist(rows, schema=_ROWS))

    (row,) = ledger.compare(spark.createDataFrame(files, schema), before).collect()

    assert row["status"] == status
