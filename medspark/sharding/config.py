"""The configuration of training shards."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field, field_validator

from medspark.config import Bits, Config
from medspark.remote import AnyPath
from medspark.shards.split import SplitConfig


class ShardConfig(Config):
    """Configuration of a sharding run: samples, pixel format, classes, split and file sizes."""

    samples: str = Field(description="folder of the sample dataset that jobs/ingest.py wrote")
    shards: AnyPath = Field(description="folder of the training shards, created or replaced")
    size: int | None = Field(
        None, ge=4, description="height and width, in pixels, at most the samples'"
    )
    bits: Bits | None = Field(None, description="bits per value, at most the samples'")
    channels: Literal["auto", "1", "3"] = Field(
        "auto", description="1, 3, or auto: 1 if every sample is grey"
    )
    classes: list[str] | None = Field(
        None,
        min_length=1,
        description="labels to keep, in the order of their numbers; by default all, sorted. If "
        "images have several labels, these are the findings to learn, and every image is kept",
    )
    seed: int = Field(0, description="seed of the split and of the shuffle")
    split: SplitConfig = Field(default_factory=SplitConfig)
    near_duplicates: int | None = Field(
        None,
        ge=0,
        le=15,
        description="put patients with near-duplicate images into one split: the number of bits by "
        "which 64-bit perceptual hashes may differ, usually 4; by default only equal pixels count",
    )
    shard_bytes: int = Field(64 << 20, ge=1 << 10, description="most bytes of pixels in one file")
    rows_per_group: int = Field(256, ge=1, description="rows in a Parquet row group")

    @field_validator("classes")
    @classmethod
    def _each_once(cls, classes: list[str] | None) -> list[str] | None:
        twice = [name for name, times in Counter(classes or ()).items() if times > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice; name each class once.")
        return classes
