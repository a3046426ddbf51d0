"""The configuration of a client's local training in a round."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medspark.attacks.threat import ThreatModel
from medspark.config import Config
from medspark.train.config import AdversarialConfig
from medspark.train.schedule import one_cycle, ramp

__all__ = ["ClientPrecision", "LocalConfig", "NormPolicy"]

# Share of all steps in which eps and the learning rate rise, as in train_at.
_RISING = 0.3

ClientPrecision = Literal["fp32", "bf16"]
NormPolicy = Literal["average", "local", "frozen", "reestimate"]


class LocalConfig(Config):
    """Local training; a step uses any mode of ``train``."""

    train: AdversarialConfig = AdversarialConfig()
    attack: ThreatModel = ThreatModel()
    epochs: int = Field(1, ge=1, description="passes of a client over its images in a round")
    epochs_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the passes every epochs_every rounds (FedDynAT)"
    )
    epochs_every: int = Field(1, ge=1, description="rounds between decays of the passes")
    batch_size: int = Field(16, ge=1, description="images in a step of a client")
    optimiser: Literal["sgd", "adamw"] = Field(
        "adamw", description="optimiser of the client; its state restarts in every round"
    )
    lr: float = Field(5e-4, gt=0, description="learning rate; its peak in schedule one_cycle")
    schedule: Literal["one_cycle", "constant"] = Field(
        "one_cycle",
        description="of eps and the learning rate: one_cycle is train_at's over all rounds; both "
        "rise over the first 30 % of the steps, then the rate falls",
    )
    lr_decay: float = Field(1.0, gt=0, le=1, description="factor on the learning rate per round")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    precision: ClientPrecision = Field(
        "fp32",
        description="of the passes; bf16 is faster on processors that multiply bf16 numbers, and "
        "slower on others. The exchanged weights are float32 with both",
    )
    weight_decay: float = Field(
        0.01, ge=0, description="weight decay; with adamw, norms and biases have none"
    )
    clip_grad: float = Field(5.0, ge=0, description="largest norm of the gradient; 0 for no limit")
    batch_norm: NormPolicy = Field(
        "frozen",
        description="average: statistics are averaged too; local: each client keeps its batch "
        "norms; frozen: statistics stay as given; reestimate: each client computes statistics from "
        "its images. Default of a federation: frozen with given weights, average with random ones",
    )
    prox: float = Field(
        0.0, ge=0, description="pull towards the round's weights (mu of FedProx, Li et al. 2020)"
    )
    scaffold: bool = Field(
        False, description="correct the clients' drift by control variates (SCAFFOLD)"
    )
    calibrate: Literal["none", "loss", "calfat"] = Field(
        "none",
        description="loss: the mode's loss calibrates logits by the client's class counts; "
        "calfat: CalFAT's attack with train.inner_steps replaces the mode's",
    )

    @model_validator(mode="after")
    def _fits(self) -> LocalConfig:
        if self.scaffold and (self.optimiser != "sgd" or self.momentum > 0):
            raise ValueError("scaffold is defined for sgd without momentum")
        if self.scaffold and self.batch_norm not in ("frozen", "reestimate"):
            raise ValueError("scaffold needs batch_norm frozen or reestimate")
        if self.train.dual_bn:
            raise ValueError("train.dual_bn is not for federations")
        if self.train.mode == "ikl":
            raise ValueError("train.mode ikl keeps mean answers over epochs: not for federations")
        return self

    def epochs_in(self, round: int) -> int:
        """Return the number of passes in a round, which decays over the rounds to at least 1."""
        return max(1, int(self.epochs * self.epochs_decay ** (round // self.epochs_every) + 0.5))

    def rate_at(self, step: int, total: int, *, round: int) -> float:
        """Return the learning rate of a step out of the ``total`` of all rounds."""
        rate = self.lr * self.lr_decay**round
        if self.schedule == "constant":
            return rate
        return one_cycle(step, total, peak=rate, rising=_RISING)

    def threat_at(self, step: int, total: int) -> ThreatModel:
        """Return the attack of a step, out of the ``total`` of all rounds."""
        if self.schedule == "constant":
            return self.attack
        eps = self.attack.eps * ramp(step, total, share=_RISING)
        return self.attack.model_copy(update={"eps": eps})
