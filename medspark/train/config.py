"""The configuration of training. This module does not import torch, so reading it is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from medspark.attacks.threat import ThreatModel
from medspark.config import Config, TrainingConfig
from medspark.data.config import DataConfig
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings, DecisionConfig
from medspark.files import json_digest
from medspark.models.config import ModelConfig
from medspark.remote import AnyPath
from medspark.train.ikl_config import IklConfig
from medspark.train.prune.config import PruneConfig

__all__ = [
    "MIXED_MODES", "AdversarialConfig", "CheckpointConfig", "DistillConfig", "FitConfig",
    "ModeName", "MonitorConfig", "RecipeSettings", "TrainConfig", "TrainPrecision",
    "TrainingSettings", "check_ranks", "check_virtual_shards", "known_before",
]  # fmt: skip

TrainPrecision = Literal["auto", "fp32", "bf16"]

ModeName = Literal[
    "standard", "naive", "fused", "fused_noise", "nfgsm", "rs_fgsm", "free", "pgd", "trades", "ikl"
]
# The modes that learn from clean and from attacked images, each with a batch norm of its own.
MIXED_MODES = ("naive", "fused", "fused_noise", "trades", "ikl")
# Runs of versions without these settings keep their hash, as long as they are at their default.
_LATER = ("awp", "awp_after", "cutmix", "ikl")


class AdversarialConfig(Config):
    """The training mode: how each batch is attacked, and which loss is minimised."""

    mode: ModeName = Field("fused_noise", description="training mode, see train/adversarial.py")
    clean_share: float = Field(
        0.5, ge=0, le=1, description="weight of the clean loss in naive, fused and fused_noise"
    )
    noise: float = Field(
        2.0, ge=0, description="largest noise in fused_noise and nfgsm, in units of eps"
    )
    step_length: float | None = Field(
        None,
        gt=0,
        description="step length of the attack in units of eps; default 1, 1.25 in rs_fgsm",
    )
    inner_steps: int = Field(7, ge=1, description="attack steps in pgd, trades and ikl")
    replays: int = Field(4, ge=1, description="updates from each batch in free")
    beta: float = Field(6.0, ge=0, description="weight of the divergence in trades")
    dual_bn: bool = Field(
        False, description="use separate batch norms for attacked images; not with frozen ones"
    )
    deploy_norm: Literal["main", "auxiliary"] = Field(
        "auxiliary",
        description="with dual_bn, the batch norms to keep: main for accuracy on clean images, "
        "auxiliary for robustness",
    )
    gradalign: float = Field(
        0.0, ge=0, description="weight of the gradient-alignment penalty; .2 is usual for 8/255"
    )


class MonitorConfig(Config):
    """Detection of overfitting to FGSM and of label leaking, and the reaction to them."""

    action: Literal["off", "warn", "restore", "noise"] = Field(
        "warn",
        description="restore stops and keeps the best epoch; noise doubles train.noise",
    )
    images: int = Field(64, ge=1, description="training images to attack after each epoch")
    steps: int = Field(10, ge=1, description="PGD steps on these images")
    gap: float = Field(
        0.25, description="FGSM accuracy minus PGD accuracy that counts as overfitting to FGSM"
    )
    drop: float = Field(0.2, description="fall of PGD accuracy below its best that counts as well")
    leak: float = Field(
        0.05, description="training accuracy, attacked minus clean, that counts as label leaking"
    )


class TrainConfig(AdversarialConfig):
    """The training recipe; the defaults train a robust network."""

    epochs: int = Field(6, ge=1, description="passes over the training images")
    batch_size: int = Field(32, ge=1, description="images per step, summed over all processes")
    # At 1e-3 some seeds give a network with zero gradient for most images: it cannot be attacked.
    lr: float = Field(3e-4, gt=0, description="peak of AdamW's one-cycle learning rate")
    lr_rise: float = Field(0.3, ge=0, lt=1, description="share of steps in which the rate rises")
    weight_decay: float = Field(
        0.01, ge=0, description="decoupled weight decay; norms and biases have none"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate per stage below the head"
    )
    head_steps: int = Field(
        0, ge=0, description="number of first steps that train only the classifier head"
    )
    eps_warmup: float = Field(
        0.3, ge=0, le=1, description="share of steps over which eps rises from 0"
    )
    batch_norm: Literal["auto", "frozen", "train", "settle"] = Field(
        "auto",
        description="auto freezes the statistics for adversarial training from given weights, and "
        "trains them otherwise and in pruning; settle freezes them at the end of eps_warmup",
    )
    sync_batch_norm: bool = Field(
        False, description="compute batch statistics over all processes; GPU only"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced weights each class by the inverse of its frequency"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of label mass spread evenly")
    temperature: float = Field(
        1.0,
        gt=0,
        description="divides the logits in the loss; the saved network uses 1. Train the teacher "
        "of defensive distillation at the temperature of the distillation",
    )
    awp: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="adversarial weight perturbation: largest change of each weight tensor in "
        "a step, relative to its norm; .005 is usual, 0: none",
    )
    awp_after: float = Field(
        0.3, ge=0, lt=1, description="share of steps before awp begins, so that a network learns"
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="CutMix: alpha of Beta(alpha, alpha), from which the area of the patch is "
        "drawn that each image gets from another one of its batch; 1 is usual, 0: none",
    )
    clip_grad: float = Field(5.0, ge=0, description="largest gradient norm; 0 for no limit")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay per step of the averaged weights to keep; 0: no average"
    )
    accumulate: int = Field(
        1, ge=1, description="micro-batches per process and step, to save memory"
    )
    elastic: Literal["none", "exact"] = Field(
        "none", description="exact gives the same weights, bit for bit, on any number of processes"
    )
    virtual_shards: int = Field(
        4, ge=1, description="pieces of each batch with elastic exact; also the most processes"
    )
    precision: TrainPrecision = Field(
        "auto", description="of the passes; auto uses bf16 if it is faster on this machine"
    )
    compile: bool = Field(False, description="whether to use torch.compile")
    validation_images: int = Field(
        512, ge=1, description="validation images to attack after each epoch"
    )
    validation_steps: int = Field(10, ge=1, description="PGD steps on the validation images")
    monitor: MonitorConfig = MonitorConfig()
    ikl: IklConfig = IklConfig()
    log_every: int = Field(20, ge=1, description="steps between log records")

    @property
    def attacks(self) -> bool:
        """Whether the mode learns from attacked images."""
        return self.mode != "standard"

    def most_ranks(self, available: int) -> int:
        """Return how many of ``available`` processes can share the images of a step; 0: none."""
        most = min(available, self.batch_size)
        if self.elastic == "none":
            return most
        even = (ranks for ranks in range(1, most + 1) if self.virtual_shards % ranks == 0)
        return max(even, default=0)


def known_before(train: dict[str, Any]) -> dict[str, Any]:
    """Return the settings ``train`` without later ones that are at their default, for a hash."""
    defaults = TrainConfig().model_dump(mode="json", include=set(_LATER))
    return {key: value for key, value in train.items() if defaults.get(key, ...) != value}


def check_ranks(train: TrainConfig, ranks: int) -> None:
    """Raise UsageError unless ``ranks`` processes can share the images of a step.

    0 stands for as many as possible, and always passes.
    """
    if ranks == 0:
        return
    if ranks > train.batch_size:
        raise UsageError(
            f"train.batch_size {train.batch_size} is too small: in every step some of the {ranks} "
            "processes have no image. Use a larger batch, or fewer processes."
        )
    if train.elastic == "exact":
        check_virtual_shards(train.virtual_shards, ranks)


def check_virtual_shards(count: int, ranks: int) -> None:
    """Raise UsageError unless ``count`` is a power of two and a multiple of ``ranks``."""
    if count & (count - 1) or count % ranks:
        raise UsageError(
            f"train.virtual_shards {count} must be a power of two and a multiple of the "
            f"{ranks} processes."
        )


Method = Literal["kd", "defensive", "ard", "rslad"]


class DistillConfig(Config):
    """The teacher of a distillation, and the method."""

    teacher: AnyPath = Field(description="folder of a trained model, as train_at writes it")
    method: Method = Field(
        "kd",
        description="kd compresses; ard and rslad transfer robustness; defensive only hides "
        "gradients",
    )
    temperature: float | None = Field(
        None, gt=0, description="of the soft labels; default kd 4, defensive 50, ard 30, rslad 1"
    )
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight of the teacher's loss; default kd .7, ard 1, rslad 5/6",
    )

    @property
    def robust(self) -> bool:
        """Whether the student learns from attacked images."""
        return self.method in ("ard", "rslad")


class CheckpointConfig(Config):
    """When to write checkpoints, and how many to keep. Each epoch ends with one."""

    every_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: by time only")
    every_minutes: float = Field(
        5.0,
        ge=0,
        description="minutes between checkpoints; 0: not by time. Each epoch ends with one anyway",
    )
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")


class RecipeSettings(TrainingConfig):
    """The settings that all trainings share, whatever network they start from."""

    decides_weights: ClassVar = frozenset({"data", "attack", "train", "seed"})
    decides_report: ClassVar = frozenset({"evaluate", "decision"})
    decides_nothing: ClassVar = frozenset({"checkpoint"})

    data: DataConfig = DataConfig()
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = TrainConfig()
    evaluate: AttackSettings = AttackSettings()
    decision: DecisionConfig = DecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: int = Field(0, ge=0, description="of the weights, the image order and all noise")

    def deciding_weights(self) -> dict[str, Any]:
        """Return the settings that decide the weights, as hashes of runs see them."""
        chosen = super().deciding_weights()
        return chosen | {"train": known_before(chosen["train"])}


class TrainingSettings(RecipeSettings):
    """The settings that all trainings of one network share."""

    decides_weights: ClassVar = frozenset({"model"})

    model: ModelConfig = ModelConfig()


class FitConfig(TrainingSettings):
    """Fine-tune one classifier on one dataset of shards."""

    decides_weights: ClassVar = frozenset({"distill", "prune", "steps"})
    decides_nothing: ClassVar = frozenset({"shards", "run_dir", "resume", "attempt"})

    shards: AnyPath = Field(description="folder that jobs/shard.py wrote")
    run_dir: Path = Field(
        Path("build/runs/train"),
        description="folder for checkpoints and the model, shared by all ranks",
    )
    distill: DistillConfig | None = Field(
        None, description="learn from a teacher instead of by train.mode"
    )
    prune: PruneConfig | None = Field(None, description="prune the network while it trains")
    steps: int | None = Field(
        None,
        ge=1,
        description="training steps, in place of train.epochs; learning rate and eps follow their "
        "schedules over this many, and the last epoch can be a part of one",
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto continues from the newest checkpoint in run_dir, if there is one"
    )
    attempt: int = Field(
        0, ge=0, description="number of this attempt; earlier attempts can no longer write"
    )

    @property
    def mode(self) -> str:
        """The name of what is done: the method of pruning or distillation, or else train.mode."""
        if self.prune is not None:
            return self.prune.method
        return self.train.mode if self.distill is None else self.distill.method

    @property
    def attacks(self) -> bool:
        """Whether training learns from attacked images."""
        if self.distill is not None:
            return self.distill.robust
        return self.train.attacks

    def total_steps(self, per_epoch: int) -> int:
        """Return the number of steps of the training, with ``per_epoch`` of them in an epoch."""
        return self.train.epochs * per_epoch if self.steps is None else self.steps

    def digest(self) -> str:
        """Return a hash of what decides the weights; paths, attempts and reports do not."""
        deciding = self.deciding_weights()
        for later in ("prune", "steps"):
            if deciding[later] is None:
                del deciding[later]  # runs of versions without these settings keep their hash
        return json_digest(deciding)
