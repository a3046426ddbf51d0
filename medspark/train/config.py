"""What can be chosen about training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from medspark.attacks.threat import ThreatModel
from medspark.config import Config
from medspark.data.source import DataConfig
from medspark.evaluate.robust import EvaluateConfig
from medspark.models.backbones import ModelConfig
from medspark.train.adversarial import MODES, AdversarialConfig
from medspark.train.distill import DistillConfig
from medspark.train.monitor import MonitorConfig
from medspark.train.state import CheckpointConfig

__all__ = ["FitConfig", "TrainConfig"]


class TrainConfig(AdversarialConfig):
    """How the network is trained; the defaults are the defended recipe."""

    epochs: int = Field(6, ge=1, description="passes over the training images")
    batch_size: int = Field(32, ge=1, description="images in a step, over all processes together")
    # At 1e-3 some seeds leave a network that is dead, and so unattackable, for most images.
    lr: float = Field(3e-4, gt=0, description="peak of the one-cycle learning rate of AdamW")
    lr_rise: float = Field(0.3, ge=0, lt=1, description="share of steps in which the rate rises")
    weight_decay: float = Field(
        0.01, ge=0, description="decoupled weight decay; none on norms and biases"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate per stage below the head"
    )
    head_steps: int = Field(
        0, ge=0, description="first steps in which only the classifier head is trained"
    )
    eps_warmup: float = Field(
        0.3, ge=0, le=1, description="share of steps over which eps rises from 0"
    )
    batch_norm: Literal["auto", "frozen", "train", "settle"] = Field(
        "auto",
        description="auto freezes the statistics for adversarial training from given weights, and "
        "lets them move otherwise; settle freezes them when eps has risen",
    )
    sync_batch_norm: bool = Field(
        False, description="take batch statistics over all processes; GPU only"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced weighs each class by the inverse of its share"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of label mass spread evenly")
    temperature: float = Field(
        1.0,
        gt=0,
        description="divides the logits in the loss; the network that is kept answers at 1. The "
        "teacher of defensive distillation learns at the temperature that it teaches at",
    )
    clip_grad: float = Field(5.0, ge=0, description="largest norm of the gradient; 0 for no limit")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay per step of the averaged weights that are kept; 0: none"
    )
    accumulate: int = Field(
        1, ge=1, description="parts that a process splits its share of a step into, to save memory"
    )
    elastic: Literal["none", "exact"] = Field(
        "none", description="exact gives the same weights, bit for bit, on any number of processes"
    )
    virtual_shards: int = Field(
        4, ge=1, description="pieces of each batch in elastic exact; the most processes it allows"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the passes; auto takes bf16 where it is the faster on this machine"
    )
    compile: bool = Field(False, description="whether to use torch.compile")
    validation_images: int = Field(
        512, ge=1, description="images of the validation split that are attacked after each epoch"
    )
    validation_steps: int = Field(10, ge=1, description="steps of PGD on them")
    monitor: MonitorConfig = MonitorConfig()
    log_every: int = Field(20, ge=1, description="steps between reports")


class FitConfig(Config):
    """Fine-tune one classifier on one dataset of shards."""

    shards: Path = Field(description="folder that jobs/shard.py wrote")
    run_dir: Path = Field(
        Path("build/runs/train"),
        description="folder for checkpoints and the model; all ranks see it",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distill: DistillConfig | None = Field(
        None, description="a teacher to learn from, instead of train.mode"
    )
    seed: int = Field(0, ge=0, description="of the weights, the order of images and all noise")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto goes on from the newest checkpoint in run_dir, if there is one"
    )
    attempt: int = Field(
        0, ge=0, description="number of this start of the run; a later one fences off earlier ones"
    )

    @property
    def attacks(self) -> bool:
        """Whether training learns from attacked images."""
        if self.distill is not None:
            return self.distill.robust
        return MODES[self.train.mode].attacks

    def digest(self) -> str:
        """Return a hash of what decides the weights; paths, attempts and reports do not."""
        decisive = self.model_dump(
            mode="json", include={"attack", "train", "model", "seed", "distill"}
        )
        decisive["data"] = self.data.model_dump(
            mode="json", include={"reader", "augment", "window", "share"}
        )
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
