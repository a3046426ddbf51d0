"""The configuration of an ingest: the archive, its labels, its limits, and the sample folder."""

from __future__ import annotations

from pydantic import Field

from medspark.config import Config
from medspark.images.deidentify import Privacy
from medspark.images.limits import Limits
from medspark.images.rendering import Rendering
from medspark.ingest.label_table import LabelConfig
from medspark.ingest.labels import coded_attribute

_DICOM = "dicom:"


class ArchiveLimits(Limits):
    """Bounds of each file, and of what an archive may hold or lead to."""

    follow_links: bool = Field(
        False, description="take files outside the source that symbolic links in it lead to"
    )
    npz_arrays: int = Field(64, ge=1, description="most arrays in an .npz archive")
    npz_images: int = Field(1 << 20, ge=1, description="most images in an .npz archive")
    npz_bytes: int = Field(
        64 << 30, ge=1, description="most bytes that the arrays of an .npz archive unpack to"
    )


class IngestConfig(Config):
    """What is read, what it means, and where it goes."""

    source: str = Field(description="folder of the archive: a path, or a URL (s3a, abfss, hdfs)")
    samples: str = Field(description="folder of the sample dataset, made or added to")
    labels: str | None = Field(
        None,
        description="CSV, TSV or Parquet table of labels, or dicom:KEYWORD for a coded attribute; "
        "by default a file's folder is its label",
    )
    inventory: str | None = Field(
        None, description="table of path, size, modified to use in place of listing the source"
    )
    image_size: int | None = Field(
        None, ge=4, le=8192, description="height and width of the samples, in pixels"
    )
    max_classes: int = Field(
        50, ge=2, description="most folders that are classes; more of them are likely patients"
    )
    label_table: LabelConfig = Field(default_factory=LabelConfig)
    rendering: Rendering = Field(default_factory=Rendering)
    limits: ArchiveLimits = Field(default_factory=ArchiveLimits)
    privacy: Privacy = Field(default_factory=Privacy)
    guarded: bool = Field(
        True, description="decode in a child process, so that no file can end or stall a worker"
    )
    dry_run: bool = Field(False, description="say what would happen, and change nothing")

    @property
    def effective_rendering(self) -> Rendering:
        """The rendering, with the image size where that was given."""
        if self.image_size is None:
            return self.rendering
        return self.rendering.model_copy(update={"size": self.image_size})

    @property
    def label_attribute(self) -> str | None:
        """The kept DICOM attribute that labels come from, if they do."""
        labels = self.labels or ""
        return coded_attribute(labels[len(_DICOM) :]) if labels.startswith(_DICOM) else None
