"""Open an archive for ingest: run all checks that need no Spark."""

from __future__ import annotations

from dataclasses import dataclass

from medspark import ownership, storage
from medspark.errors import UsageError
from medspark.images.deidentify import Pseudonyms, load_key
from medspark.images.resident import pseudonyms_of
from medspark.ingest import npz
from medspark.ingest.config import IngestConfig
from medspark.ingest.label_table import LabelTable
from medspark.ingest.labels import has_class_folders
from medspark.ingest.quarantine import QuarantineList
from medspark.ingest.sample_set import SampleSet, SamplesManifest


@dataclass(frozen=True)
class Archive:
    """A checked source, with everything that its ingest needs. Nothing has been written yet."""

    config: IngestConfig
    source: str
    samples: SampleSet
    table: LabelTable | None
    multi_label: bool  # whether a sample has any number of findings instead of one class
    pseudonyms: Pseudonyms
    quarantined: QuarantineList

    @property
    def source_key(self) -> str:
        """The name of the source in the ledger."""
        return self.pseudonyms.name("source", self.source)

    @property
    def by_folder(self) -> bool:
        """Whether a file's folder is its label."""
        return self.config.labels is None and not npz.is_npz(self.source)


def open_archive(config: IngestConfig, *, key: bytes | None = None) -> Archive:
    """Check everything that can be checked without Spark. Raises UsageError for the first problem.

    ``key`` replaces the secret key of the pseudonyms if the archive holds no real patients, as in
    the demo.
    """
    source, samples = storage.normalise(config.source), SampleSet(config.samples)
    if npz.is_npz(source):
        npz.list_images(source, config.limits)
    elif not storage.is_folder(source):
        raise UsageError(f"There is no source folder {config.source}.")
    ownership.apart({"the source": source}, {"the samples": samples.url})
    ownership.check(samples.url, "samples")
    table = None
    if config.labels is None:
        by_folder = config.inventory is None and not npz.is_npz(source)
        if by_folder and not has_class_folders(source):
            raise UsageError(f"{source} has no class folders: give a label table with --labels.")
    elif config.label_attribute is None and npz.is_npz(source):
        raise UsageError(f"{source} carries its own labels: --labels has no meaning here.")
    elif config.label_attribute is None:
        table = LabelTable(
            config.labels, source, config.label_table, follow_links=config.limits.follow_links
        )
    several = config.label_table.several
    if table is None and several:
        raise UsageError("label_table describes a label table: name the table with --labels.")
    manifest = samples.manifest()
    if config.inventory_of == "changes" and (config.inventory is None or manifest is None):
        lacks = "--inventory" if config.inventory is None else "an ingest of all files before"
        raise UsageError(f"--inventory_of changes needs {lacks}.")
    listed = QuarantineList.of(config.privacy, dataset=samples.url, source=source)
    key = key or load_key(config.privacy, dataset=samples.url, new=manifest is None)
    pseudonyms = pseudonyms_of(config.privacy, key)
    multi_label = several or (npz.is_npz(source) and npz.has_findings(source, config.limits))
    archive = Archive(config, source, samples, table, multi_label, pseudonyms, listed)
    if manifest:
        _check_same(manifest, archive)
    return archive


def _check_same(manifest: SamplesManifest, archive: Archive) -> None:
    config, pseudonyms = archive.config, archive.pseudonyms
    if manifest.key_check != pseudonyms.check:
        raise UsageError(
            f"{config.samples} was made with another pseudonym key; name that key's file with "
            "--privacy.key_file, or write to another folder."
        )
    if manifest.multi_label != archive.multi_label:
        has = "any number of labels" if manifest.multi_label else "one label"
        raise UsageError(
            f"Images of {config.samples} have {has} each, and images of {config.source} do not "
            "(see label_table); write to another folder."
        )
    rendering = config.effective_rendering.model_dump(mode="json")
    for key, value in rendering.items():
        if manifest.rendering.get(key) != value:
            raise UsageError(
                f"{config.samples} was rendered with {key} {manifest.rendering.get(key)}, not "
                f"{value}; write to another folder."
            )
