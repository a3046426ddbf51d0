"""The configuration of an ingest: the archive, its labels, its limits, and the sample folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medspark.config import Config
from medspark.images.deidentify import Privacy
from medspark.images.limits import Limits
from medspark.images.rendering import Rendering
from medspark.ingest.label_table import LabelConfig
from medspark.ingest.labels import coded_attribute

_DICOM = "dicom:"


class ArchiveLimits(Limits):
    """Limits per file, and limits of the whole archive."""

    follow_links: bool = Field(
        False, description="follow symbolic links that lead out of the source"
    )
    npz_arrays: int = Field(64, ge=1, description="most arrays in an .npz archive")
    npz_images: int = Field(1 << 20, ge=1, description="most images in an .npz archive")
    npz_bytes: int = Field(
        64 << 30, ge=1, description="most bytes that the arrays of an .npz archive unpack to"
    )


class IngestConfig(Config):
    """Configuration of an ingest: source, labels, rendering, limits, and the sample folder."""

    source: str = Field(description="folder of the archive: a path, or a URL (s3, abfss, hdfs)")
    samples: str = Field(description="folder of the sample dataset, created or extended")
    labels: str | None = Field(
        None,
        description="CSV, TSV or Parquet table of labels, or dicom:KEYWORD for a coded attribute; "
        "by default a file's folder is its label",
    )
    inventory: str | None = Field(
        None, description="table of path, size, modified; replaces listing the source"
    )
    inventory_of: Literal["all", "changes"] = Field(
        "all",
        description="what the inventory names: all files, or those that are new or changed since "
        "the last ingest of this source; then no other file is looked at, and none counts as gone; "
        "a file that goes into quarantine because of a new one is in the private list only after "
        "an ingest of all files",
    )
    image_size: int | None = Field(
        None, ge=4, le=8192, description="height and width of the samples, in pixels"
    )
    max_classes: int = Field(
        50, ge=2, description="most class folders; if there are more, they are probably patients"
    )
    label_table: LabelConfig = Field(default_factory=LabelConfig)
    rendering: Rendering = Field(default_factory=Rendering)
    limits: ArchiveLimits = Field(default_factory=ArchiveLimits)
    privacy: Privacy = Field(default_factory=Privacy)
    guarded: bool = Field(
        True, description="decode in a child process, so that no file can end or stall a worker"
    )
    dry_run: bool = Field(False, description="report what would happen, and change nothing")

    @property
    def effective_rendering(self) -> Rendering:
        """The rendering, with ``image_size`` as its size if one is given."""
        if self.image_size is None:
            return self.rendering
        return self.rendering.model_copy(update={"size": self.image_size})

    @property
    def label_attribute(self) -> str | None:
        """The stored DICOM attribute that labels come from, or None if they come from elsewhere."""
        labels = self.labels or ""
        return coded_attribute(labels[len(_DICOM) :]) if labels.startswith(_DICOM) else None
