"""Settings of a training that exclude each other, refused before any expensive work."""

from __future__ import annotations

from medspark.errors import UsageError
from medspark.train.config import RecipeSettings

__all__ = ["check_combinations"]


def check_combinations(config: RecipeSettings, *, multi_label: bool) -> None:
    """Raise UsageError if settings of ``config`` exclude each other.

    ``multi_label`` states whether the images have findings, not classes.
    """
    train, distill = config.train, getattr(config, "distill", None)
    attacks = train.attacks if distill is None else distill.robust
    if train.awp > 0 and not attacks:
        name = f"train.mode {train.mode}" if distill is None else f"method {distill.method}"
        raise UsageError(f"train.awp raises the loss of attacked images, and {name} makes none.")
    if train.mode == "ikl" and distill is None and multi_label:
        raise UsageError(
            "train.mode ikl weighs by the mean answers to each class, and these images have "
            "findings: use trades."
        )
    if train.cutmix > 0 and config.data.reader != "native":
        raise UsageError(
            "train.cutmix needs data.reader native, which reads images by number: "
            f"data.reader {config.data.reader} cannot read an image's partner."
        )
