"""The configuration of reading shards and of augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from medspark.config import Config, TrainingConfig
from medspark.data.petastorm_import import import_petastorm
from medspark.errors import UsageError

__all__ = ["AugmentConfig", "DataConfig", "check_data"]


class AugmentConfig(Config):
    """The augmentation of training images; validation and test images are not augmented."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a left-right flip")
    shift: float = Field(
        0.0, ge=0, le=0.5, description="largest shift per axis, as a fraction of the image's side"
    )
    turn: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a turn by one, two or three quarters, for images without an "
        "up, as cells and tissue; .75 makes four directions equally likely; images that are not "
        "square are turned by a half",
    )

    @model_serializer(mode="wrap")
    def _as_before_turns(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``turn`` out where it is 0, so that runs of earlier versions have the same hash."""
        found: dict[str, Any] = dump(self)
        return found if self.turn else {k: v for k, v in found.items() if k != "turn"}


class DataConfig(TrainingConfig):
    """The reader of shards, and its settings."""

    decides_weights: ClassVar = frozenset({"reader", "augment", "window", "share"})
    decides_nothing: ClassVar = frozenset({"verify", "prefetch", "cache_dir"})

    reader: Literal["native", "petastorm"] = Field(
        "native", description="reader of the shards; native is much faster"
    )
    augment: AugmentConfig = AugmentConfig()
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the training images to use, by whole patients; the seed selects "
        "them, a smaller share is part of a larger one, and epochs are shorter",
    )
    verify: Literal["contents", "size"] = Field(
        "contents", description="check of the files before the first step; contents means SHA-256"
    )
    prefetch: int = Field(4, ge=1, description="number of batches to prepare ahead")
    window: int = Field(2048, ge=1, description="rows in the petastorm reader's shuffle window")
    cache_dir: Path | None = Field(
        None,
        description="local folder of each machine for copies of remote shards (s3://), as large as "
        "they are; by default medspark below XDG_CACHE_HOME or ~/.cache",
    )


def check_data(config: DataConfig) -> None:
    """Raise UsageError if the reader is not installed or does not support ``share``."""
    if config.reader == "petastorm":
        import_petastorm()
        if config.share < 1:
            raise UsageError("data.share needs the native reader, which reads images by number.")
