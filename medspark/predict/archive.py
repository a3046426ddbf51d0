"""Open an archive for a prediction: run all checks that need no Spark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medspark import ownership, storage
from medspark.errors import UsageError
from medspark.images.deidentify import Pseudonyms, load_key, private_file
from medspark.images.rendering import Rendering
from medspark.images.resident import pseudonyms_of
from medspark.ingest import npz
from medspark.ingest.quarantine import QuarantineList, check_outside
from medspark.predict.config import PredictConfig
from medspark.predict.folder import PredictionFolder, PredictionManifest

__all__ = ["Asked", "ModelFacts", "open_archive"]


@dataclass(frozen=True)
class ModelFacts:
    """What the folder of the answers keeps of a model, and how the model wants files rendered."""

    digest: str
    classes: tuple[str, ...]
    multi_label: bool
    rendering: Rendering


@dataclass(frozen=True)
class Asked:
    """A checked source, with everything that a prediction needs. Nothing has been written yet."""

    config: PredictConfig
    model: ModelFacts
    source: str
    folder: PredictionFolder
    pseudonyms: Pseudonyms
    quarantined: QuarantineList
    paths: Path

    @property
    def manifest(self) -> PredictionManifest:
        """The manifest of the folder, or the one that it gets first."""
        return self.folder.manifest() or self._first

    @property
    def _first(self) -> PredictionManifest:
        return PredictionManifest(
            model=self.model.digest,
            classes=self.model.classes,
            multi_label=self.model.multi_label,
            source_key=self.pseudonyms.name("source", self.source),
            key_check=self.pseudonyms.check,
        )

    def check_same(self) -> None:
        """Raise UsageError if the folder holds answers of another model, archive or key."""
        there, first, answers = self.manifest, self._first, self.config.answers
        if there.key_check != first.key_check:
            raise UsageError(
                f"{answers} was made with another pseudonym key; name that key's file with "
                "--privacy.key_file, or give another folder."
            )
        if there.model != first.model:
            raise UsageError(
                f"{answers} holds the answers of another model, or of this one before it changed: "
                "give another folder."
            )
        if there.source_key != first.source_key:
            raise UsageError(f"{answers} holds answers on another archive: give another folder.")


def open_archive(
    config: PredictConfig, model: ModelFacts, *, read: Mapping[str, Path], key: bytes | None = None
) -> Asked:
    """Check everything that can be checked without Spark. Raises UsageError for the first problem.

    ``read`` names further folders that the answers must not overlap. ``key`` replaces the secret
    key of the pseudonyms if the archive holds no real patients.
    """
    source, folder = storage.normalise(config.source), PredictionFolder(config.answers)
    if npz.is_npz(source):
        npz.list_images(source, config.limits)
    elif not storage.is_folder(source):
        raise UsageError(f"There is no source folder {config.source}.")
    ownership.apart({"the source": source, **read}, {"the answers": folder.url})
    ownership.check(folder.url, "predictions")
    manifest = folder.manifest()
    listed = QuarantineList.of(config.privacy, dataset=folder.url, source=source)
    paths = config.paths_file or private_file(folder.url, "paths", ".csv")
    check_outside(paths, (folder.url, source), setting="paths_file")
    key = key or load_key(config.privacy, dataset=folder.url, new=manifest is None)
    pseudonyms = pseudonyms_of(config.privacy, key)
    asked = Asked(config, model, source, folder, pseudonyms, listed, paths)
    asked.check_same()
    return asked
