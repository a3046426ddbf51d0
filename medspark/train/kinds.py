"""The recipe that a kind of network needs, where the user has not chosen otherwise.

The defaults of ``train`` suit convolutional networks with batch norm. Networks without it learn
more slowly, and from random weights they need many epochs. Fine-tuning against attacks has a recipe
of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from medspark.models.config import model_folder, timm_name
from medspark.train.config import TrainConfig, TrainingSettings

__all__ = ["FINE_TUNING", "KINDS", "Kind", "kind_of", "recipe_line", "with_recipe"]

C = TypeVar("C", bound=TrainingSettings)


@dataclass(frozen=True)
class Kind:
    """A kind of network: what its names in timm begin with, and its settings of ``train``.

    ``from_random`` are settings that it needs besides where it starts from random weights.
    """

    name: str
    prefixes: tuple[str, ...]
    recipe: dict[str, Any]
    from_random: dict[str, Any]

    def settings(self, weights: str | None) -> dict[str, Any]:
        """Return the settings of ``train`` for a network that starts from ``weights``."""
        return self.recipe | (self.from_random if weights is None else {})


KINDS = (
    Kind(
        "vision transformer",
        ("vit_", "deit_", "deit3_"),
        {
            "lr": 2e-4,
            "batch_size": 8,
            "weight_decay": 0.05,
            "clip_grad": 1.0,
            "eps_warmup": 0.6,
        },
        {"lr": 5e-4, "batch_size": 16, "epochs": 24},
    ),
    Kind(
        "ConvNeXt",
        ("convnext",),
        {
            "lr": 5e-4,
            "batch_size": 16,
            "weight_decay": 0.05,
            "clip_grad": 1.0,
            "eps_warmup": 0.6,
        },
        {"lr": 1e-3, "epochs": 24},
    ),
)

# Of convolutional networks with batch norm that start from the weights of another task and are
# trained against attacks by the default mode; measured in tests/claims/recipe_rates.json.
FINE_TUNING: dict[str, Any] = {
    "lr": 6e-4,
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "ema": 0.99,
}


def kind_of(name: str) -> Kind | None:
    """Return the kind of the network with that ``model.name``, None for the usual one."""
    architecture = timm_name(name)
    return next((kind for kind in KINDS if architecture.startswith(kind.prefixes)), None)


def with_recipe(config: C) -> C:
    """Return ``config`` with the recipe of its kind of network.

    Keys of ``train`` that were set, in a file, on the command line or in code, stay as they are.
    What is chosen here counts as set, so a second call changes nothing.
    """
    chosen = _chosen(config)
    if not chosen:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update=chosen)})


def recipe_line(config: TrainingSettings) -> str:
    """Return what ``with_recipe`` would choose for ``config``, in one line; "" for nothing."""
    kind, chosen = kind_of(config.model.name), _chosen(config)
    if not chosen:
        return ""
    listed = ", ".join(
        f"train.{key} {value if isinstance(value, str) else format(value, 'g')}"
        for key, value in chosen.items()
    )
    if kind is None:
        return f"{config.model.name} is fine-tuned against attacks with {listed}"
    return f"{config.model.name} is a {kind.name}, which trains with {listed}"


def _chosen(config: TrainingSettings) -> dict[str, Any]:
    kind = kind_of(config.model.name)
    if kind is not None:
        recipe = kind.settings(config.model.weights)
    else:
        recipe = FINE_TUNING if _is_fine_tuned(config) else {}
    return {key: value for key, value in recipe.items() if key not in config.train.model_fields_set}


def _is_fine_tuned(config: TrainingSettings) -> bool:
    """Return whether attacks of the default mode meet a network that learnt another task.

    The weights of a model folder learnt this task already. A student learns from its teacher.
    """
    model = config.model
    given = model.weights is not None and model_folder(model) is None
    taught = getattr(config, "distill", None) is not None
    return given and not taught and config.train.mode == TrainConfig.model_fields["mode"].default
