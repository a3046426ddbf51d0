"""Describe a model in words, and to MLflow: purpose, training data, figures, use, limits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from medspark.evaluate.names import in_markdown, short
from medspark.evaluate.noise_result import noise_lines
from medspark.evaluate.operating_point import decision_lines
from medspark.evaluate.sanity import SIGN
from medspark.models.card import ModelCard, columns_of
from medspark.shards.manifest import Manifest
from medspark.track.config import TrackConfig
from medspark.track.spool import ModelEntry
from medspark.train.result import TrainResult
from medspark.workflows.robustness_table import robustness_table

__all__ = ["describe_model", "model_entry"]

_LIMITS = """## What it is not

- Not a medical device. It has been shown no prospective data and no other hospital's.
- The figures are of one split of one data set; another site, scanner or population gives others.
- Robust means: against changes of every pixel by at most eps after windowing, found by the attacks
  named here. A stronger attack, a larger eps or another kind of change may still fool it.
- A probability is calibrated on validation images like those it was trained on, and on no attacked
  ones.
"""


def describe_model(result: TrainResult, manifest: Manifest, card: ModelCard) -> str:
    """Return the description of the network in ``result``, as Markdown."""
    trained = manifest.splits["train"]
    counted = zip(_names(manifest.classes), trained.class_counts, strict=True)
    counts = ", ".join(f"{name}: {count}" for name, count in counted)
    flagged = "; ".join(flag.sentence for flag in result.triggered_flags)
    verdict = f"{SIGN} do not trust them: {flagged}" if flagged else "no sanity check objects"
    return f"""# {card.architecture}, {result.mode}

{_purpose(card)} in images of {manifest.height} x {manifest.width} pixels,
{manifest.channels} channel{"s" if manifest.channels > 1 else ""}, {manifest.bits} bits.

## Trained on

{result.train_images} images ({counts} in the whole split, {trained.patients}
patients), data digest `{manifest.digest[:16]}`, {result.epochs} epochs, seen by
{result.world_size} process(es). Nobody is in two splits.

## How it fares

{robustness_table({"": result})}

On {result.images} test images; {verdict}.
{_decided(result)}{_pruned(result)}
## How to ask it

A DICOM, PNG, JPEG or TIFF file in base64, in the column `image`; it is brought to the training
images' form (`{card.rendering or "size and depth alone"}`). The answer is {_answer(card)}
with logits divided by {card.temperature:.3g}, which fits the validation images best (temperature
scaling).

{_LIMITS}"""


def model_entry(folder: Path, manifest: Manifest, track: TrackConfig, *, card: str) -> ModelEntry:
    """Return how MLflow keeps the network in ``folder``, described by ``card`` in Markdown.

    A network whose folder holds a guard is served with it.
    """
    guarded = (folder / "guard").is_dir()
    plain = "medspark.models.predictor:Predictor.load"
    files = "medspark.models.file_predictor:FilePredictor.load"
    return ModelEntry(
        folder=folder,
        loader="medspark.defend.detect.served:GuardedPredictor.load" if guarded else plain,
        input_shape=(manifest.height, manifest.width, manifest.channels),
        outputs=len(manifest.classes) + guarded,
        file_loader="medspark.defend.detect.served:guarded_files" if guarded else files,
        classes=columns_of(manifest.classes, guarded=guarded),
        guarded=guarded,
        card=card,
        register_as=track.register_as,
        alias=track.alias,
    )


def _decided(result: TrainResult) -> str:
    """Return a section on the operating point; "" for a network that answers the likeliest."""
    lines = decision_lines(result)
    return "\n".join(["", "## Where it decides", "", *lines, ""]) if lines else ""


def _pruned(result: TrainResult) -> str:
    """Return a section on what was pruned, and on noisy weights; "" for other networks."""
    if result.sparsity is None:
        return ""
    gone = f"{100 * (result.multiply_adds_removed or 0):.1f} %"
    lines = [
        "",
        "## Pruned",
        "",
        f"{100 * result.sparsity:.1f} % of its weights are exactly zero, and {gone} of the "
        "multiply-adds of the architecture are gone.",
    ]
    if result.noise is not None:
        lines += ["It answers without the noise in its weights.", "", *noise_lines(result.noise)]
    return "\n".join([*lines, ""])


def _purpose(card: ModelCard) -> str:
    names = ", ".join(_names(card.classes))
    return f"Finds any of {names}" if card.multi_label else f"Tells {names} apart"


def _names(classes: Iterable[str]) -> list[str]:
    return [in_markdown(short(name)) for name in classes]


def _answer(card: ModelCard) -> str:
    if card.multi_label:
        return (
            "the findings that are likelier than not\n(`a|b`) and a probability of its own for "
            "every finding,"
        )
    label = "likeliest" if card.decision is None else "decided"
    return f"the {label} class and\na probability for every class,"
