"""How shards are read, and how training images are varied."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from medspark.config import Config, TrainingConfig
from medspark.data.petastorm_import import import_petastorm
from medspark.errors import UsageError

__all__ = ["AugmentConfig", "DataConfig", "check_data"]


class AugmentConfig(Config):
    """How training images are varied; validation and test images never are."""

    flip: float = Field(0.5, ge=0, le=1, description="share of images mirrored left to right")
    shift: float = Field(
        0.0, ge=0, le=0.5, description="largest shift either way, as a part of the image's side"
    )


class DataConfig(TrainingConfig):
    """How shards are read."""

    decides_weights: ClassVar = frozenset({"reader", "augment", "window", "share"})
    decides_nothing: ClassVar = frozenset({"verify", "prefetch", "cache_dir"})

    reader: Literal["native", "petastorm"] = Field(
        "native", description="what reads the shards; native is the faster one by far"
    )
    augment: AugmentConfig = AugmentConfig()
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="part of the training images, by whole patients, that is trained on; the seed "
        "says which, a smaller part lies in a larger one, and epochs are shorter",
    )
    verify: Literal["contents", "size"] = Field(
        "contents", description="what is checked before the first step; contents means SHA-256"
    )
    prefetch: int = Field(4, ge=1, description="batches that are prepared ahead")
    window: int = Field(2048, ge=1, description="rows that the petastorm reader shuffles at a time")
    cache_dir: Path | None = Field(
        None, description="local folder that remote shards are copied to"
    )


def check_data(config: DataConfig) -> None:
    """Raise UsageError for a reader that is not installed or cannot do what is asked."""
    if config.reader == "petastorm":
        import_petastorm()
        if config.share < 1:
            raise UsageError("data.share needs the native reader, which reads images by number.")
