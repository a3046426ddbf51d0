"""How a client trains on its own images between two rounds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medspark.attacks.threat import ThreatModel
from medspark.config import Config
from medspark.federate.weights import NormPolicy
from medspark.train.config import AdversarialConfig

__all__ = ["LocalConfig"]


class LocalConfig(Config):
    """Local training; what is attacked and learnt in a step is any mode of ``train``."""

    train: AdversarialConfig = AdversarialConfig()
    attack: ThreatModel = ThreatModel()
    epochs: int = Field(1, ge=1, description="passes of a client over its images in a round")
    epochs_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the passes every epochs_every rounds (FedDynAT)"
    )
    epochs_every: int = Field(1, ge=1, description="rounds after which there are fewer passes")
    batch_size: int = Field(32, ge=1, description="images in a step of a client")
    optimiser: Literal["sgd", "adamw"] = Field(
        "sgd", description="of the client; it forgets its state from round to round"
    )
    lr: float = Field(0.01, gt=0, description="learning rate, constant in a round")
    lr_decay: float = Field(1.0, gt=0, le=1, description="factor on the learning rate per round")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(0.0, ge=0, description="of the client's optimiser")
    clip_grad: float = Field(5.0, ge=0, description="largest norm of the gradient; 0 for no limit")
    batch_norm: NormPolicy = Field(
        "frozen",
        description="average: statistics travel too; local: nothing of batch norm travels; frozen: "
        "statistics stay as given; reestimate: everybody takes statistics from images of its own",
    )
    prox: float = Field(
        0.0, ge=0, description="pull towards the round's weights (mu of FedProx, Li et al. 2020)"
    )
    scaffold: bool = Field(
        False, description="correct the clients' drift by control variates (SCAFFOLD)"
    )
    calibrate: Literal["none", "loss", "calfat"] = Field(
        "none",
        description="loss: logits are calibrated by the client's classes in the mode's loss; "
        "calfat: learn from CalFAT's own attack with train.inner_steps, whatever the mode",
    )

    @model_validator(mode="after")
    def _fits(self) -> LocalConfig:
        if self.scaffold and (self.optimiser != "sgd" or self.momentum > 0):
            raise ValueError("scaffold is defined for sgd without momentum")
        if self.scaffold and self.batch_norm not in ("frozen", "reestimate"):
            raise ValueError("scaffold needs batch_norm frozen or reestimate")
        if self.train.dual_bn:
            raise ValueError("train.dual_bn is not for federations")
        return self

    def epochs_in(self, round: int) -> int:
        """Return the passes in a round: E decays over the rounds, and is 1 at least."""
        return max(1, int(self.epochs * self.epochs_decay ** (round // self.epochs_every) + 0.5))

    def rate_in(self, round: int) -> float:
        """Return the learning rate in a round."""
        return self.lr * self.lr_decay**round
