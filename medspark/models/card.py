"""The model card model.json: all that is needed to use the weights or the graph beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from medspark import __version__
from medspark.config import Config, first_problem
from medspark.documents import parse_json, read_regular
from medspark.errors import UsageError
from medspark.files import write_whole
from medspark.models.local import local_model

if TYPE_CHECKING:  # reading a card, on a device too, must not need pyarrow
    from medspark.shards.manifest import Manifest

__all__ = [
    "CARD", "PLAIN", "WEIGHTS", "Criterion", "Decision", "DenoiserShape", "ExportedGraph", "Kind",
    "ModelCard", "Pruning", "Rate", "Recalibration", "columns_of", "read_card", "write_card",
]  # fmt: skip

WEIGHTS, CARD = "model.safetensors", "model.json"
# The other columns of a prediction: no class may take their names.
_ANSWER = ("label", "probability", "error")
_OF_GUARD = ("suspicious", "p_value")
_LARGEST = 1 << 22  # bytes of a card
_PICKLED = {".pt", ".pth", ".pt2", ".pkl", ".pickle", ".bin", ".ckpt"}


# The limits allow every model that medspark trains, and reject cards that only cost memory.
ClassName = Annotated[str, Field(min_length=1, max_length=1000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LayerName = Annotated[str, Field(min_length=1, max_length=200)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
Side = Annotated[int, Field(ge=1, le=8192)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# Only these names: a card must not name a file outside its folder.
GraphFile = Literal["model.onnx", "model.xml", "model.bin"]
Kind = Literal["classifier", "pruned", "guarded", "onnx", "openvino"]
Criterion = Literal["sensitivity", "specificity", "youden"]
# Networks without a denoiser, and all networks with weights.
PLAIN: tuple[Kind, ...] = ("classifier", "pruned")
_CLASSIFIERS: tuple[Kind, ...] = (*PLAIN, "guarded")


class ExportedGraph(Config):
    """The graph of an exported model: its files, and how it stores numbers."""

    precision: Literal["fp32", "int8"]
    files: dict[GraphFile, Sha256] = Field(min_length=1, description="SHA-256 of each file")
    opset: int = Field(ge=1, description="version of the ONNX operators")
    numbers: str = Field(description="format of weights and activations", max_length=200)
    twin: Sha256 = Field(description="SHA-256 of the weights that the graph was made from")


class Pruning(Config):
    """How a network was pruned. Weights that are exactly zero are pruned, and stay so."""

    method: Literal["rsr", "magnitude", "lasso", "noise", "hydra"]
    sparsity: float = Field(ge=0, lt=1, description="the share that was asked for")
    noise: bool = Field(False, description="whether the file holds scales of noisy weights")
    widths: dict[LayerName, tuple[Width, Width]] = Field(
        {}, max_length=10_000, description="output and input channels of narrowed layers"
    )


class Rate(Config):
    """How many images of a class were called right."""

    right: int = Field(ge=0)
    images: int = Field(ge=0)
    design_effect: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.0, description="variance of the share over a binomial one; images of a patient correlate"
    )


class Decision(Config):
    """The operating point of a model of two classes, and how it does where it was chosen."""

    positive: ClassName = Field(description="the class that is called from the threshold on")
    threshold: float = Field(gt=0, lt=1, description="of the calibrated probability of positive")
    criterion: Criterion = Field(description="what the threshold was chosen for")
    target: float | None = Field(
        None, gt=0, le=1, description="sensitivity or specificity to reach"
    )
    under: Literal["clean", "pgd"] = Field("clean", description="the images it was chosen on")
    eps: float = Field(0.0, ge=0, le=1, description="budget of pgd, a fraction of [0, 1]")
    norm: Literal["linf", "l2"] = Field("linf", description="norm of pgd")
    sensitivity: Rate = Field(description="of the images that the threshold was chosen on")
    specificity: Rate = Field(description="of the images that the threshold was chosen on")

    @model_validator(mode="after")
    def _has_its_target(self) -> Decision:
        if (self.criterion == "youden") != (self.target is None):
            raise ValueError(
                f"the criterion {self.criterion} does not fit the target {self.target}"
            )
        return self


class Recalibration(Config):
    """The sample of a site that temperature and threshold were fitted to, and the model before."""

    before: Sha256 = Field(description="SHA-256 of the card before")
    dataset_digest: str = Field(description="of the site's shards", max_length=200)
    split: str = Field(max_length=20)
    images: int = Field(ge=1)
    patients: int = Field(ge=1)
    seed: int = Field(ge=0)


class DenoiserShape(Config):
    """The sizes of a guarded classifier's denoiser, a vision transformer, and of its embedding."""

    grid: int = Field(8, ge=1, le=64, description="patches along each side of an image")
    width: int = Field(128, ge=1, le=2048, description="numbers in a token")
    depth: int = Field(4, ge=1, le=64, description="transformer blocks")
    heads: int = Field(4, ge=1, le=64, description="attention heads; they divide the width")
    stem: int = Field(16, ge=1, le=1024, description="channels of the features of single pixels")
    embedding: int = Field(64, ge=1, le=4096, description="numbers in an image's embedding")

    @model_validator(mode="after")
    def _heads_divide(self) -> DenoiserShape:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        return self


class ModelCard(Config):
    """The description of a model's weights. The card may come from an untrusted source."""

    schema_version: Literal[1, 2] = Field(2, description="version of the format; 1 had no kind")
    kind: Kind = Field("classifier", description="network with weights, or the graph's format")
    architecture: str = Field(description="timm model name", max_length=200)
    classes: tuple[ClassName, ...] = Field(min_length=2, max_length=10_000)
    multi_label: bool = Field(
        False, description="whether classes are independent findings, each with its own logit"
    )
    channels: int = Field(ge=1, le=64)
    height: Side = Field(description="of the training images, in pixels")
    width: Side = Field(description="of the training images, in pixels")
    bits: Literal[8, 16] = Field(8, description="bits per stored sample; 2**bits - 1 becomes 1.0")
    mean: tuple[Finite, ...] = Field(description="subtracted per channel, in [0, 1] pixels")
    std: tuple[Positive, ...] = Field(description="divided by per channel, in [0, 1] pixels")
    dropout: float = Field(0.0, ge=0, lt=1)
    temperature: Positive = Field(1.0, description="divides the logits for calibrated probability")
    rendering: dict[str, Any] = Field({}, description="how files were rendered for training")
    medspark: str = Field("", description="version of medspark that wrote the files")
    exported: ExportedGraph | None = Field(None, description="the graph of an exported model")
    pruning: Pruning | None = Field(None, description="of a pruned network, and of its exports")
    decision: Decision | None = Field(
        None, description="the operating point; without one, the likeliest class is the answer"
    )
    recalibrated: Recalibration | None = Field(
        None, description="what fitted temperature and decision to a site"
    )
    denoiser: DenoiserShape | None = Field(
        None, description="of a guarded network, and of its exports"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> ModelCard:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"{self.channels} channel(s) need as many means and deviations, but there are "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is named twice")
        if (self.kind in _CLASSIFIERS) != (self.exported is None):
            raise ValueError(f"kind {self.kind} does not fit the description of the graph")
        if self.exported is None and (self.kind == "guarded") != (self.denoiser is not None):
            raise ValueError(f"kind {self.kind} does not fit the description of the denoiser")
        pruned = self.pruning is not None  # a guarded network may be pruned as well
        if self.exported is None and self.kind in PLAIN and (self.kind == "pruned") != pruned:
            raise ValueError(f"kind {self.kind} does not fit the description of the pruning")
        if self.decision is not None:
            if self.multi_label or len(self.classes) != 2:
                raise ValueError("a decision needs a model of two classes")
            if self.decision.positive not in self.classes:
                raise ValueError(f"the decision's class {self.decision.positive!r} is no class")
        return self

    @property
    def positive(self) -> int | None:
        """The index of the class that the decision calls from its threshold on, if there is one."""
        return None if self.decision is None else self.classes.index(self.decision.positive)

    def misfit(self, manifest: Manifest) -> str:
        """Return how the model's classes and images differ from the shards'; "" if they match."""
        own, shards = _task(self), _task(manifest)
        return "" if own == shards else f"it predicts {own}, but the shards hold {shards}"


_FORMATS: tuple[int, ...] = get_args(ModelCard.model_fields["schema_version"].annotation)
_KINDS: tuple[str, ...] = get_args(ModelCard.model_fields["kind"].annotation)
_VERSION = re.compile(r"\d[\w.+-]{0,30}")


def columns_of(classes: Sequence[str], *, guarded: bool = False) -> tuple[str, ...]:
    """Return the column names of the probabilities of ``classes`` in predictions.

    They are the class names. A class called like another column, with ``guarded`` those of a guard
    too, gets the prefix "class ".
    """
    others = (*_ANSWER, *_OF_GUARD) if guarded else _ANSWER
    taken, columns = {*others, *classes}, []
    for name in classes:
        column = name
        while column in others or (column != name and column in taken):
            column = f"class {column}"
        columns.append(column)
    return tuple(columns)


def _task(of: ModelCard | Manifest) -> str:
    kind = "any of" if of.multi_label else "one of"
    return f"{kind} {', '.join(of.classes)} in images of {of.channels} channel(s)"


def read_card(folder: Path, *, kinds: Collection[Kind] = _CLASSIFIERS) -> ModelCard:
    """Return the card of the model in ``folder``, which has to be of one of ``kinds``.

    Raises UsageError if it is missing or invalid, or has an unknown kind or format version; then
    the message names the version of medspark that wrote it.
    """
    folder = local_model(folder)
    if folder.suffix in _PICKLED:
        raise UsageError(
            f"'{folder}' is a pickled model, and opening one can run code; use a folder with "
            f"{WEIGHTS} and {CARD}."
        )
    from medspark.images.rendering import Rendering  # imports Pillow: only to open a model

    path = folder / CARD
    try:
        content = read_regular(path, most=_LARGEST)
        _check_known(path, content)
        card = ModelCard.model_validate_json(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{folder}' is not a medspark model: it has no {CARD}.") from error
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise UsageError(f"'{path}' is not valid: {first_problem(error)}.") from error
    try:
        Rendering.model_validate(card.rendering)
    except ValidationError as error:
        problem = first_problem(error, below="rendering")
        raise UsageError(f"'{path}' is not valid: {problem}.") from error
    if card.kind not in kinds:
        raise UsageError(
            f"'{folder}' holds a model of kind {card.kind}; this takes one of kind "
            f"{' or '.join(kinds)}."
        )
    for name in (WEIGHTS,) if card.exported is None else card.exported.files:
        if not (folder / name).is_file():  # reading a device would never end
            raise UsageError(
                f"'{folder}' is not a medspark model: its {name} is missing or no file."
            )
    return card


def _check_known(path: Path, content: bytes) -> None:
    """Raise UsageError for a card of a newer format version, or of an unknown kind."""
    try:
        document = parse_json(content)
    except ValueError:
        return  # the validation reports the error
    if not isinstance(document, dict):
        return
    version, kind = document.get("schema_version", 1), document.get("kind", _KINDS[0])
    if type(version) is int and version > _FORMATS[-1]:
        unknown = f"schema_version {str(version)[:20]}"
    elif isinstance(kind, str) and kind not in _KINDS:
        unknown = f"kind {kind[:100]!r}"
    else:
        return
    writer = str(document.get("medspark", ""))
    newer = f"{writer} or newer" if _VERSION.fullmatch(writer) else "a newer version"
    raise UsageError(
        f"'{path}' has {unknown}, which medspark {__version__} does not know: install medspark "
        f"{newer}."
    )


def write_card(folder: Path, card: ModelCard) -> None:
    """Write ``card`` to ``folder`` atomically, in the newest format."""
    card = card.model_copy(update={"schema_version": _FORMATS[-1]})
    # Without empty fields, a classifier's card can be read by medspark before graphs were exported.
    write_whole(folder / CARD, card.model_dump_json(indent=2, exclude_none=True) + "\n")
