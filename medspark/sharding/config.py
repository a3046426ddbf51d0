"""What training shards are made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from medspark.config import Bits, Config
from medspark.shards.split import SplitConfig


class ShardConfig(Config):
    """What the training shards are made of."""

    samples: str = Field(description="folder of the sample dataset that jobs/ingest.py wrote")
    shards: Path = Field(description="folder of the training shards, made or replaced")
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
        description="the labels to keep, in the order of their numbers; by default all, sorted. "
        "Where an image has several they are the findings that are learnt, and every image is kept",
    )
    seed: int = Field(0, description="seed of the split and of the shuffle")
    split: SplitConfig = Field(default_factory=SplitConfig)
    near_duplicates: int | None = Field(
        None,
        ge=0,
        le=15,
        description="keep patients with images that look alike in one split: the bits, of the 64 "
        "of a perceptual hash, that may differ; by default only equal pixels count. 4 is usual",
    )
    shard_bytes: int = Field(64 << 20, ge=1 << 10, description="most pixels in one file, in bytes")
    rows_per_group: int = Field(256, ge=1, description="rows in a Parquet row group")

    @field_validator("classes")
    @classmethod
    def _each_once(cls, classes: list[str] | None) -> list[str] | None:
        twice = [name for name, times in Counter(classes or ()).items() if times > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice, and a class has one number.")
        return classes
