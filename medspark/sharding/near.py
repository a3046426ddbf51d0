"""Find near duplicates: images of several patients that look alike although their pixels differ.

A radiograph that is exported twice, at another size or compressed, has two pixel hashes. Under two
patient ids it could be in both train and test. Perceptual hashes of 64 bits (pHash: the signs of
the low frequencies of a cosine transform; Zauner 2010) differ in few bits if images look alike.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from medspark import storage
from medspark.errors import UsageError
from medspark.sharding.reshape import ReadSamples
from medspark.shards.schema import PixelFormat
from medspark.shards.split import together
from medspark.spark.cluster import default_parallelism
from medspark.spark.task import map_batches

# The table of samples that look like another patient's, in the shard folder.
NEAR_DUPLICATES = "near_duplicates.parquet"
_NEAR_SCHEMA = pa.schema(
    {"sample_key": pa.string(), "patient_key": pa.string(), "lookalike": pa.int64()}
)

SIDE = 32  # height and width of the image that pHash transforms
_HASH_BITS = 64
_HASHED = "sample_key string, patient_key string, hash bigint"


def check_library() -> None:
    """Raise UsageError if ImageHash, the library of perceptual hashes, is not installed."""
    if find_spec("imagehash") is None:
        raise UsageError("Near duplicates need ImageHash: pip install 'medspark[near]'.")


@dataclass(frozen=True)
class HashSamples:
    """Reads samples and computes their perceptual hashes, in a task."""

    samples: str
    parts: dict[str, tuple[int, str]]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        read = ReadSamples(self.samples, self.parts, PixelFormat(SIDE, SIDE, 1, 8))
        for batch in read(batches):
            yield pa.RecordBatch.from_pydict(
                {
                    "sample_key": batch.column("sample_key"),
                    "patient_key": batch.column("patient_key"),
                    "hash": [perceptual_hash(p.as_py()) for p in batch.column("pixels")],
                }
            )


def perceptual_hash(pixels: bytes) -> int:
    """Return the pHash of a grey image, 32 x 32 bytes, as a signed 64-bit integer."""
    from imagehash import phash  # optional dependency, needed in tasks only

    image = np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE)
    signs = phash(Image.fromarray(image), hash_size=8, highfreq_factor=SIDE // 8).hash
    return int.from_bytes(np.packbits(signs).tobytes(), "big", signed=True)


class Lookalike(NamedTuple):
    """A sample that looks like another patient's; ``lookalike`` is the number of its group."""

    sample_key: str
    patient_key: str
    lookalike: int


def lookalikes(rows: DataFrame, samples: HashSamples, *, bits: int) -> list[Lookalike]:
    """Return the samples that look like a sample of another patient.

    ``rows`` have sample_key, patient_key, site, part and row. Two images look alike if their
    hashes differ in at most ``bits`` bits. The relation is closed transitively: connected images
    form one group with one number.
    """
    spark = rows.sparkSession
    tasks = min(len(samples.parts), 8 * default_parallelism(spark))
    placed = rows.select(
        F.lit(0).alias("bucket"), F.lit(0).cast("bigint").alias("position"), "sample_key",
        "patient_key", "site", F.lit(0).alias("number"), "part", "row",
    )  # fmt: skip
    by_part = placed.repartition(max(1, tasks), "part").sortWithinPartitions("part", "row")
    hashed = map_batches(by_part, samples, _HASHED).persist()
    try:
        near = together(_near_hashes(hashed, bits))
        numbers = spark.createDataFrame(list(near.items()), "hash bigint, first bigint")
        numbered = hashed.join(F.broadcast(numbers), "hash", "left").select(
            "sample_key", "patient_key", F.coalesce("first", "hash").alias("lookalike")
        )
        patients = F.size(F.collect_set("patient_key").over(Window.partitionBy("lookalike")))
        shared = numbered.withColumn("patients", patients).where(F.col("patients") > 1)
        found = shared.drop("patients").orderBy("lookalike", "sample_key").collect()
    finally:
        hashed.unpersist()
    return _numbered([Lookalike(*row) for row in found])


def _numbered(found: list[Lookalike]) -> list[Lookalike]:
    """Return ``found`` with group numbers instead of hashes, since hashes can identify an image."""
    numbers: dict[int, int] = {}
    for one in sorted(found):
        numbers.setdefault(one.lookalike, len(numbers) + 1)
    numbered = [one._replace(lookalike=numbers[one.lookalike]) for one in found]
    return sorted(numbered, key=lambda one: (one.lookalike, one.sample_key))


def tied_patients(found: Iterable[Lookalike]) -> dict[str, str]:
    """Return, for every patient of ``found``, the smallest patient key of its group."""
    first: dict[int, str] = {}
    return together(
        (one.patient_key, first.setdefault(one.lookalike, one.patient_key)) for one in found
    )


def with_groups(samples: DataFrame, tied: Mapping[str, str]) -> DataFrame:
    """Return ``samples`` with the ``group`` of their patient: from ``tied``, or the patient key."""
    table = samples.sparkSession.createDataFrame(
        list(tied.items()), "patient_key string, tied string"
    )
    joined = samples.join(F.broadcast(table), "patient_key", "left")
    return joined.withColumn("group", F.coalesce("tied", "patient_key")).drop("tied")


def write_lookalikes(found: list[Lookalike], url: str) -> None:
    """Write ``found`` as a Parquet table, atomically."""
    table = pa.Table.from_pylist([row._asdict() for row in found], schema=_NEAR_SCHEMA)
    content = io.BytesIO()
    pq.write_table(table, content)
    storage.write_bytes(url, content.getvalue())


def _near_hashes(hashed: DataFrame, bits: int) -> list[tuple[int, int]]:
    """Return the pairs of hashes that differ in 1 to ``bits`` bits.

    A hash is cut into bits + 1 bands. Two such hashes agree in at least one band, so only hashes
    with a common band are compared.
    """
    if bits == 0:
        return []
    edges = [_HASH_BITS * band // (bits + 1) for band in range(bits + 2)]
    hashes = hashed.select("hash").distinct()
    bands = [
        F.struct(
            F.lit(low).alias("band"),
            F.shiftrightunsigned("hash", low).bitwiseAND((1 << (high - low)) - 1).alias("value"),
        )
        for low, high in itertools.pairwise(edges)
    ]
    banded = hashes.select("hash", F.explode(F.array(*bands)).alias("at"))
    others = banded.withColumnRenamed("hash", "other")
    near = (
        banded.join(others, "at")
        .where(F.col("hash") < F.col("other"))
        .where(F.bit_count(F.col("hash").bitwiseXOR(F.col("other"))) <= bits)
        .select("hash", "other")
        .distinct()
    )
    return [(row["hash"], row["other"]) for row in near.collect()]
