"""The split that a job attacks: checked before Spark starts, and described in every report."""

from __future__ import annotations

from pathlib import Path

from medspark.errors import UsageError
from medspark.evaluate.summary import Array, Detail
from medspark.models.card import read_card
from medspark.remote import any_path
from medspark.shards.local import patients_of
from medspark.shards.manifest import read_manifest, verify
from medspark.track.models import fetch_model
from medspark.track.spool import DatasetEntry
from medspark.workflows.evaluate_config import AttackedShards, positive_class

__all__ = ["AttackedData", "resolve_model"]


class AttackedData:
    """The images of one split, and the facts that reports on them need."""

    def __init__(self, config: AttackedShards) -> None:
        """Read and verify the manifest. Raises UsageError if the split has no images."""
        self._config = config
        self.manifest = read_manifest(config.shards)
        verify(config.shards, self.manifest, contents=False)
        self.check_split(config.split)
        self.positive = positive_class(config.positive, self.manifest.classes)

    def check_split(self, name: str) -> None:
        """Raise UsageError if the split ``name`` has no images."""
        if name not in self.manifest.splits or not self.manifest.splits[name].rows:
            raise UsageError(f"The shards in {self._config.shards} have no {name} images.")

    @property
    def rows(self) -> int:
        """The number of images of the split."""
        return self.manifest.splits[self._config.split].rows

    @property
    def drawn(self) -> int | None:
        """The class of the ROC curve; None draws one curve over all findings."""
        if self.positive is None and not self.manifest.multi_label:
            return len(self.manifest.classes) - 1
        return self.positive

    @property
    def shards(self) -> str:
        """The folder and the digest of the shards, for reports."""
        return f"{self._config.shards}, digest {self.manifest.digest[:12]}"

    @property
    def entry(self) -> DatasetEntry:
        """The split as MLflow lists it."""
        return DatasetEntry(
            name=self._config.split,
            digest=self.manifest.digest,
            source=str(self._config.shards),
        )

    def detail(self, rows: Array) -> Detail:
        """Return what the figures of ``rows`` of the split need: patients, classes, resamples."""
        patients = patients_of(self._config.shards, self.manifest, self._config.split)
        return Detail(
            groups=patients[rows],
            samples=self._config.bootstrap,
            classes=self.manifest.classes,
            seed=self._config.seed,
        )


def resolve_model(name: str, *, uri: str | None) -> Path:
    """Return the folder or file of the model ``name``, fetched from MLflow if it is an MLflow URI.

    Raises UsageError for an ONNX file or a model folder that does not exist.
    """
    if name.startswith(("models:/", "runs:/")):
        return fetch_model(name, uri=uri)
    path = any_path(name)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UsageError(f"model: there is no file '{path}'.")
        return path
    read_card(path)
    return path
