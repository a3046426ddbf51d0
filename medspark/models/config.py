"""Which network, and where its first weights come from."""

from __future__ import annotations

import difflib
from pathlib import Path

from pydantic import Field

from medspark.config import Config
from medspark.errors import UsageError

__all__ = ["PRETRAINED", "ModelConfig", "check_model", "timm_name"]

PRETRAINED = "pretrained"
ALIASES = {"mobilenet_v2": "mobilenetv2_100", "mobilenetv2": "mobilenetv2_100"}


class ModelConfig(Config):
    """Which network, and where its first weights come from."""

    name: str = Field(
        "mobilenetv2_100",
        description="timm model name; densenet121, mobilenet_v2 and resnet50 are the usual ones",
    )
    weights: str | None = Field(
        None,
        description="first weights: 'pretrained' (timm's, from the hub), the path of a "
        ".safetensors file with timm's names, or none for random ones",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="drop rate before the classifier head")


def check_model(config: ModelConfig) -> None:
    """Raise UsageError if ``config`` names an unknown model or a weights file that is unfit."""
    from medspark.models.backbones import import_timm, tensor_names  # with torch and timm

    name = timm_name(config.name)
    timm = import_timm()
    if not timm.is_model(name):
        known = [*timm.list_models(), *ALIASES]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()."
        raise UsageError(f"model.name: timm has no model '{config.name}'; {hint}")
    if config.weights == PRETRAINED:
        if not timm.is_model_pretrained(name):
            raise UsageError(f"model.weights: timm has no pretrained weights for '{name}'.")
    elif config.weights is not None:
        tensor_names(Path(config.weights))


def timm_name(name: str) -> str:
    """Return the name by which timm knows ``name``."""
    return ALIASES.get(name, name)
