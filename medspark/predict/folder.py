"""The folder of a prediction: answers, quarantine, and a manifest that commits them.

    manifest.json                      the model and the source; names the files that count
    answers/<generation>/*.parquet     a row for each file that the model answered
    quarantine/<generation>/*.parquet  a row for each file that cannot be read, with the reason
    work/*.parquet                     what tasks have finished since the last commit
    staging/                           temporary files of a job that runs or was killed

A job that was killed leaves the files of its finished tasks in ``work``, and the next one goes on
from there. A commit replaces the manifest atomically. Readers ignore files that it does not name.
The folder holds no path of the archive.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from medspark import ownership, storage
from medspark.errors import UsageError
from medspark.files import DRAFT
from medspark.ingest.sample_set import GENERATION, SPARK_FILES, STAGED
from medspark.spark.tables import read_files

__all__ = ["OUTCOMES", "QUARANTINE", "PredictionFolder", "PredictionManifest", "piece_name"]

MANIFEST = "manifest.json"
_TEXT = pa.string()
# What is kept of every file. A file without a reason was answered.
OUTCOMES = pa.schema(
    [
        ("file_key", _TEXT),  # pseudonym of the path, as in ledgers of samples
        ("fingerprint", _TEXT),  # pseudonym of size and time of change
        ("reason", _TEXT),
        ("message", _TEXT),
        ("patient_key", _TEXT),
        ("study_key", _TEXT),
        ("series_key", _TEXT),
        ("instance_key", _TEXT),
        ("frame", pa.int32()),  # the frame that was answered, from 1
        ("label", _TEXT),
        ("probability", pa.float64()),
        ("probabilities", pa.map_(_TEXT, pa.float64())),  # calibrated, by class
    ]
)
QUARANTINE = ("file_key", "fingerprint", "reason", "message")
_SPARK_SCHEMA = from_arrow_schema(OUTCOMES)
_PIECE = re.compile(r"[0-9a-f]{32}-(\d+)\.parquet")
_TABLES = ("answers", "quarantine")


def piece_name(unique: str, rows: int) -> str:
    """Return the name of the file of a finished task; it tells the number of its rows."""
    return f"work/{unique}-{rows}.parquet"


class PredictionManifest(BaseModel):
    """What was asked of which files, and the files that hold the answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str  # SHA-256 of the model's files
    classes: tuple[str, ...]
    multi_label: bool
    source_key: str
    key_check: str  # equal for equal keys of the pseudonyms
    generation: str | None = None
    files: int = 0
    answers: tuple[str, ...] = ()
    quarantine: tuple[str, ...] = ()


class PredictionFolder:
    """The folder of one model's answers on one archive, local or on any shared file system."""

    def __init__(self, url: str) -> None:
        self.url = storage.normalise(url)
        self._version: str | None = None  # of the manifest that was read last

    def path(self, *names: str) -> str:
        """Return the path of a file or folder of the prediction."""
        return storage.join(self.url, "/".join(names))

    def manifest(self) -> PredictionManifest | None:
        """Return the manifest, or None if no job has started yet. Raises UsageError for another."""
        try:
            text, self._version = storage.read_version(self.path(MANIFEST))
        except FileNotFoundError:
            self._version = None
            return None
        try:
            return PredictionManifest.model_validate_json(text)
        except ValidationError as error:
            place = self.path(MANIFEST)
            raise UsageError(
                f"{place} is not a manifest of predictions, or a newer one."
            ) from error

    def commit(self, manifest: PredictionManifest) -> None:
        """Make ``manifest`` the content of the folder, atomically.

        It replaces the manifest that this object read last. Raises RunError if that is not the
        folder's any more.
        """
        text = manifest.model_dump_json(indent=1)
        self._version = storage.commit(self.path(MANIFEST), text, self._version)

    def pieces(self) -> list[str]:
        """Return the names of the files that finished tasks left, relative to the folder."""
        return [f"work/{name}" for name in self._names("work") if _PIECE.fullmatch(name)]

    def finished(self) -> int:
        """Return how many files the tasks have finished since the last commit."""
        found = map(_PIECE.fullmatch, self._names("work"))
        return sum(int(name[1]) for name in found if name)

    def written(self, table: str, generation: str) -> tuple[str, ...]:
        """Return the Parquet files of a generation of ``table``, relative to the folder."""
        place = f"{table}/{generation}"
        return tuple(f"{place}/{name}" for name in sorted(self._names(place)) if _is_data(name))

    def read(self, spark: SparkSession, names: Sequence[str]) -> DataFrame:
        """Return the rows of the files ``names``, with all columns of OUTCOMES."""
        return read_files(spark, [self.path(name) for name in names], _SPARK_SCHEMA)

    def clean_staging(self) -> None:
        """Remove the temporary files of a job."""
        ownership.remove(self.url, [*STAGED, rf"work/\.{_PIECE.pattern}{DRAFT}"])

    def clean_generations(self) -> None:
        """Remove the tables of all generations but the committed one."""
        manifest = self.manifest()
        kept = manifest.generation if manifest else None
        for table in _TABLES:
            for name in self._names(table):
                if re.fullmatch(GENERATION, name) and name != kept:
                    place = f"{table}/{name}"
                    ownership.remove(self.url, [f"{place}/{SPARK_FILES}", f"{place}/_temporary/"])

    def clean_pieces(self) -> None:
        """Remove what tasks had finished, after its commit."""
        ownership.remove(self.url, [f"work/{_PIECE.pattern}"])

    def _names(self, folder: str) -> list[str]:
        place = self.path(folder)
        storage.filesystem(place)[0].invalidate_cache()
        if not storage.is_folder(place):
            return []
        return [entry.path.rpartition("/")[2] for entry in storage.children(place)]


def _is_data(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith((".", "_"))
