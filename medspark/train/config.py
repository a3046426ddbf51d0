"""What can be chosen about training; read long before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from medspark.attacks.threat import ThreatModel
from medspark.config import Config, TrainingConfig
from medspark.data.config import DataConfig
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings
from medspark.files import json_digest
from medspark.models.config import ModelConfig

__all__ = [
    "AdversarialConfig", "CheckpointConfig", "DistillConfig", "FitConfig", "ModeName",
    "MonitorConfig", "TrainConfig", "TrainingSettings", "check_ranks", "check_virtual_shards",
]  # fmt: skip

ModeName = Literal[
    "standard", "naive", "fused", "fused_noise", "nfgsm", "rs_fgsm", "free", "pgd", "trades"
]


class AdversarialConfig(Config):
    """What each batch is attacked with, and what is learnt from it."""

    mode: ModeName = Field("fused_noise", description="how a step attacks and learns")
    clean_share: float = Field(
        0.5, ge=0, le=1, description="weight of the clean loss in naive, fused and fused_noise"
    )
    noise: float = Field(
        2.0, ge=0, description="reach of the noise in fused_noise and nfgsm, in units of eps"
    )
    step_length: float | None = Field(
        None,
        gt=0,
        description="length of the attack's step in units of eps; 1, and 1.25 in rs_fgsm",
    )
    inner_steps: int = Field(7, ge=1, description="steps of the attack in pgd and trades")
    replays: int = Field(4, ge=1, description="updates made from each batch in free")
    beta: float = Field(6.0, ge=0, description="weight of the divergence in trades")
    dual_bn: bool = Field(
        False, description="give attacked images batch norms of their own; not for frozen ones"
    )
    deploy_norm: Literal["main", "auxiliary"] = Field(
        "auxiliary", description="with dual_bn, what is kept: main for accuracy on clean images"
    )
    gradalign: float = Field(
        0.0, ge=0, description="weight of the gradient-alignment penalty; .2 is usual for 8/255"
    )


class MonitorConfig(Config):
    """What is watched, and what happens when it is seen."""

    action: Literal["off", "warn", "restore", "noise"] = Field(
        "warn",
        description="restore stops and keeps the best epoch; noise doubles train.noise and goes on",
    )
    images: int = Field(64, ge=1, description="training images that are attacked after each epoch")
    steps: int = Field(10, ge=1, description="steps of PGD on them")
    gap: float = Field(
        0.25, description="FGSM accuracy above PGD accuracy that counts as overfitting to FGSM"
    )
    drop: float = Field(0.2, description="fall of PGD accuracy below its best that counts as well")
    leak: float = Field(
        0.05, description="accuracy on attacked above clean training images that counts as leaking"
    )


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

    @property
    def attacks(self) -> bool:
        """Whether the mode learns from attacked images."""
        return self.mode != "standard"

    def most_ranks(self, available: int) -> int:
        """Return the most processes, ``available`` at most, that can share a step's images."""
        most = min(available, self.batch_size)
        if self.elastic == "none":
            return most
        even = (ranks for ranks in range(1, most + 1) if self.virtual_shards % ranks == 0)
        return max(even, default=0)


def check_ranks(train: TrainConfig, ranks: int) -> None:
    """Raise UsageError unless ``ranks`` processes can share a step's images.

    0 stands for as many as can.
    """
    if ranks == 0:
        return
    if ranks > train.batch_size:
        raise UsageError(
            f"train.batch_size {train.batch_size} leaves some of the {ranks} processes without an "
            "image in every step: give a larger batch, or fewer processes."
        )
    if train.elastic == "exact":
        check_virtual_shards(train.virtual_shards, ranks)


def check_virtual_shards(count: int, ranks: int) -> None:
    """Raise UsageError unless ``count`` is a power of two that ``ranks`` share out evenly."""
    if count & (count - 1) or count % ranks:
        raise UsageError(
            f"train.virtual_shards {count} has to be a power of two and a multiple of the "
            f"{ranks} processes."
        )


Method = Literal["kd", "defensive", "ard", "rslad"]


class DistillConfig(Config):
    """Who teaches, and what is learnt from it."""

    teacher: Path = Field(description="folder of a trained model, as train_at leaves it")
    method: Method = Field(
        "kd", description="kd compresses; ard and rslad carry robustness over; defensive hides"
    )
    temperature: float | None = Field(
        None, gt=0, description="of the softened answers; kd 4, defensive 50, ard 30, rslad 1"
    )
    alpha: float | None = Field(
        None, ge=0, le=1, description="weight of the teacher's part; kd .7, ard 1, rslad 5/6"
    )

    @property
    def robust(self) -> bool:
        """Whether the student learns from attacked images."""
        return self.method in ("ard", "rslad")


class CheckpointConfig(Config):
    """When checkpoints are written, and which are kept."""

    every_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: by time alone")
    every_minutes: float = Field(
        5.0,
        ge=0,
        description="minutes between checkpoints, also written after each epoch; 0: never",
    )
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


class TrainingSettings(TrainingConfig):
    """The settings that everything which trains one network has."""

    decides_weights: ClassVar = frozenset({"data", "model", "attack", "train", "seed"})
    decides_report: ClassVar = frozenset({"evaluate"})
    decides_nothing: ClassVar = frozenset({"checkpoint"})

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = TrainConfig()
    evaluate: AttackSettings = AttackSettings()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: int = Field(0, ge=0, description="of the weights, the order of images and all noise")


class FitConfig(TrainingSettings):
    """Fine-tune one classifier on one dataset of shards."""

    decides_weights: ClassVar = frozenset({"distill"})
    decides_nothing: ClassVar = frozenset({"shards", "run_dir", "resume", "attempt"})

    shards: Path = Field(description="folder that jobs/shard.py wrote")
    run_dir: Path = Field(
        Path("build/runs/train"),
        description="folder for checkpoints and the model; all ranks see it",
    )
    distill: DistillConfig | None = Field(
        None, description="a teacher to learn from, instead of train.mode"
    )
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
        return self.train.attacks

    def digest(self) -> str:
        """Return a hash of what decides the weights; paths, attempts and reports do not."""
        return json_digest(self.deciding_weights())
