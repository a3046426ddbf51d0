"""Fit a model's temperature and threshold to a few labelled images of a site: jobs/recalibrate.py.

Fifty images take seconds, so the job runs in the driver and starts no Spark session.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from medspark import ownership
from medspark.attacks.threat import ThreatModel
from medspark.data.native import MappedSplit
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.decision import count_at, probability, rates_at
from medspark.evaluate.names import in_markdown
from medspark.evaluate.operating_point import decision_sentence
from medspark.evaluate.recalibrate import (
    Goal,
    Sample,
    Site,
    differ,
    draw,
    images_needed,
    interval,
    judge,
    miscalibrated,
)
from medspark.files import sha256_of
from medspark.models.card import (
    CARD,
    WEIGHTS,
    Decision,
    ModelCard,
    Rate,
    Recalibration,
    read_card,
    write_card,
)
from medspark.models.config import ModelConfig
from medspark.models.deciding import decision_shift
from medspark.models.local import local_model
from medspark.shards.local import patients_of
from medspark.shards.manifest import read_manifest, verify
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, RunEntry
from medspark.train.decide import scores_of
from medspark.train.run_folder import check_run_folder, held_run
from medspark.train.world import World
from medspark.workflows.attacked_data import resolve_model
from medspark.workflows.lineage import lineage
from medspark.workflows.model_description import model_entry
from medspark.workflows.recalibrate_config import Estimate, RecalibrateConfig, RecalibrateResult

__all__ = ["SiteSample", "recalibrate", "warning_of"]

_CHANCE = 0.05


class SiteSample:
    """A model, a site's images, and how the model decides: checked before anything is computed."""

    def __init__(self, config: RecalibrateConfig) -> None:
        """Find model and images. Raises UsageError if they are missing or do not fit."""
        self.config = config
        self.model = resolve_model(config.model, uri=config.track.uri)
        if self.model.suffix == ".onnx":
            raise UsageError(f"model: '{self.model}' has no card; give a model folder.")
        self.card = read_card(self.model)
        self.manifest = read_manifest(config.shards)
        verify(config.shards, self.manifest, contents=False)
        if difference := self.card.misfit(self.manifest):
            raise UsageError(f"The model '{self.model}' does not fit: {difference}.")
        self.yes = config.decision.positive_of(self.card.classes, multi_label=self.card.multi_label)
        if config.decision.positive is None and self.card.positive is not None:
            self.yes = self.card.positive
        split = self.manifest.splits.get(config.split)
        if split is None or split.rows < config.images:
            rows = 0 if split is None else split.rows
            raise UsageError(
                f"images: the {config.split} split of {config.shards} has only {rows} images."
            )

    @property
    def goal(self) -> Goal:
        """What the threshold is chosen for: as asked, or as in the card."""
        asked, kept = self.config.decision, self.card.decision
        if asked.criterion is not None:
            return Goal(asked.criterion, asked.target)
        return Goal("youden") if kept is None else Goal(kept.criterion, kept.target)

    @property
    def threat(self) -> ThreatModel | None:
        """The attack that the threshold is chosen under, if any."""
        asked, kept = self.config.decision, self.card.decision
        if asked.criterion is not None:
            return self.config.attack if asked.under == "pgd" else None
        if kept is None or kept.under == "clean":
            return None
        return ThreatModel(norm=kept.norm, eps=kept.eps)

    def all_images(self) -> Sample:
        """Return all images of the split, with their scores."""
        return self._scored(np.arange(self.manifest.splits[self.config.split].rows))

    def drawn(self) -> Sample:
        """Return the sample. Raises UsageError if it lacks a class."""
        patients = patients_of(self.config.shards, self.manifest, self.config.split)
        rows, _ = draw(patients, self.config.images, seed=self.config.seed)
        sample = self._scored(rows)
        if not sample.has_both:
            missing = self.card.classes[1 - self.yes if sample.positive.all() else self.yes]
            raise UsageError(
                f"images: the {self.config.images} images drawn hold no {missing}; draw more."
            )
        return sample

    def _scored(self, rows: np.ndarray) -> Sample:  # type: ignore[type-arg]
        images = MappedSplit(self.config.shards, self.manifest, self.config.split)
        settings = AttackSettings(steps=self.config.steps, seed=self.config.seed)
        world = World(0, 0, 1, torch.device("cpu"))
        of_images = self.model, images, rows, self.yes
        clean = scores_of(*of_images, None, settings, world)
        if self.threat is None:
            scores = clean
        else:
            scores = scores_of(*of_images, self.threat, settings, world)
        patients = patients_of(self.config.shards, self.manifest, self.config.split)[rows]
        return Sample(images.labels[rows] == self.yes, patients, clean, scores)


def recalibrate(config: RecalibrateConfig, *, output: Path) -> RecalibrateResult:
    """Fit the model to a sample of the site, write it as a new version, and return the result.

    ``output`` names the default folder. Raises UsageError for an error in the settings, the model
    or the shards.
    """
    site = SiteSample(config)
    place = (config.run_dir or output.with_suffix(".run")).resolve()
    fixed = config.run_dir is not None
    ownership.apart({"the model": site.model}, {"the folder of the run": place})
    check_run_folder(place, fixed=fixed, shards=config.shards, model=ModelConfig())
    sample = site.drawn()
    with held_run(place, fixed=fixed, resume="never", overwrite=config.overwrite) as folder:
        with tracked(folder, config.track, _entry(site)) as run:
            found = judge(
                sample,
                site.goal,
                temperature=site.card.temperature,
                resamples=config.bootstrap,
                seed=config.seed,
            )
            card = _new_card(site, sample, found)
            _write_model(site.model, folder / "model", card)
            result = _result(site, sample, found, card, folder / "model")
            run.end(
                "FINISHED",
                summary=_metrics(result),
                model=model_entry(
                    folder / "model", site.manifest, config.track, card=_describe(result, card)
                )
                if config.track.log_model
                else None,
                patience_seconds=config.track.patience_seconds,
            )
        return result.model_copy(update={"mlflow": run.reference})


def _entry(site: SiteSample) -> RunEntry:
    config = site.config
    return RunEntry(
        name=f"recalibrate {Path(config.model).name}",
        config=config.model_dump(mode="json"),
        tags={"medspark.job": "recalibrate"} | lineage(model=site.model),
        dataset=DatasetEntry(
            name=config.split, digest=site.manifest.digest, source=str(config.shards)
        ),
    )


def _new_card(site: SiteSample, sample: Sample, found: Site) -> ModelCard:
    """Return the card of the new version; its rates are those expected at the site."""
    goal, threat = site.goal, site.threat
    decision = Decision(
        positive=site.card.classes[site.yes],
        threshold=found.fit.threshold,
        criterion=goal.criterion,
        target=goal.target,
        under="clean" if threat is None else "pgd",
        eps=0.0 if threat is None else threat.eps,
        norm="linf" if threat is None else threat.norm,
        sensitivity=found.sensitivity,
        specificity=found.specificity,
    )
    origin = Recalibration(
        before=sha256_of(site.model / CARD),
        dataset_digest=site.manifest.digest,
        split=site.config.split,
        images=len(sample.positive),
        patients=len(np.unique(sample.patients)),
        seed=site.config.seed,
    )
    changed = {"temperature": found.fit.temperature, "decision": decision, "recalibrated": origin}
    return site.card.model_copy(update=changed)


def _write_model(source: Path, folder: Path, card: ModelCard) -> None:
    """Write the weights of ``source`` with the new ``card``, the card last."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(local_model(source) / WEIGHTS, folder / WEIGHTS)
    write_card(folder, card)


def _result(
    site: SiteSample, sample: Sample, found: Site, card: ModelCard, model: Path
) -> RecalibrateResult:
    assert card.decision is not None, "the new card has a decision"
    needed = {
        "sensitivity": images_needed(found.sensitivity, share=float(sample.positive.mean())),
        "specificity": images_needed(found.specificity, share=float((~sample.positive).mean())),
    }
    old = count_at(sample.scores, sample.positive, _old_cut(site.card, site.yes))
    classes = site.card.classes
    return RecalibrateResult(
        temperature=_estimate(found.fit.temperature, found.temperature),
        threshold=_estimate(found.fit.threshold, found.threshold),
        sensitivity=_estimate(_share(found.sensitivity), interval(found.sensitivity)),
        specificity=_estimate(_share(found.specificity), interval(found.specificity)),
        images_needed=max(needed.values()),
        images_needed_for=needed,
        warning=warning_of(site.card, sample, site.threat, positive=site.yes),
        decision=card.decision,
        before={
            "temperature": site.card.temperature,
            "threshold": float(probability(_old_cut(site.card, site.yes) / site.card.temperature)),
            "sensitivity": old.sensitivity,
            "specificity": old.specificity,
        },
        images=len(sample.positive),
        patients=len(np.unique(sample.patients)),
        class_counts={
            classes[site.yes]: int(sample.positive.sum()),
            classes[1 - site.yes]: int((~sample.positive).sum()),
        },
        model=str(model),
        dataset_digest=site.manifest.digest,
        split=site.config.split,
    )


def _old_cut(card: ModelCard, positive: int) -> float:
    """Return the raw log-odds of class ``positive`` at which the card decides."""
    return decision_shift(card) if card.positive in (None, positive) else -decision_shift(card)


def warning_of(
    card: ModelCard, sample: Sample, threat: ThreatModel | None, *, positive: int
) -> str | None:
    """Return how the sample differs from the model's validation images; None if chance explains it.

    With a decision in the card, under the same attack, the rates at its threshold are compared,
    each by Fisher's exact test at half the level. Otherwise the calibration is tested.
    """
    kept = card.decision
    under = ("clean", 0.0) if threat is None else ("pgd", threat.eps)
    if kept is None or card.positive != positive or (kept.under, kept.eps) != under:
        chance = miscalibrated(sample, temperature=card.temperature)
        if chance >= _CHANCE:
            return None
        return (
            "The site differs from the validation images by more than chance: the calibrated "
            f"probabilities do not fit the labels (score test, p = {chance:.2g})."
        )
    here = rates_at(sample.scores, sample.positive, decision_shift(card), sample.patients)
    there = kept.sensitivity, kept.specificity
    named = zip(("sensitivity", "specificity"), here, there, strict=True)
    found = [
        f"the {name} is {_counts(site)} here and {_counts(old)} there (p = {chance:.2g})"
        for name, site, old in named
        if (chance := differ(site, old)) < _CHANCE / 2
    ]
    if not found:
        return None
    return (
        "The site differs from the validation images by more than chance: at the model's old "
        f"threshold {' and '.join(found)}, by Fisher's exact test."
    )


def _counts(rate: Rate) -> str:
    return f"{rate.right}/{rate.images}"


def _share(rate: Rate) -> float:
    return rate.right / rate.images


def _estimate(value: float, bounds: tuple[float, float] | None) -> Estimate:
    low, high = bounds or (None, None)
    return Estimate(value=value, low=low, high=high)


def _metrics(result: RecalibrateResult) -> dict[str, float]:
    """Return the figures by their MLflow metric names."""
    names = ("temperature", "threshold", "sensitivity", "specificity")
    found: dict[str, float] = {}
    for name in names:
        estimate = getattr(result, name).model_dump(exclude_none=True)
        found |= {f"site/{name}/{part}": value for part, value in estimate.items()}
    return found | {"site/images_needed": float(result.images_needed)}


def _describe(result: RecalibrateResult, card: ModelCard) -> str:
    """Return the description of the new version, as Markdown."""
    warning = [] if result.warning is None else ["", in_markdown(result.warning)]
    return "\n".join([
        f"# {card.architecture}, recalibrated",
        "",
        f"The weights are those of another version. Temperature and threshold are of "
        f"{result.images} images of {result.patients} patients, {result.split} split of data "
        f"digest `{result.dataset_digest[:16]}`.",
        "",
        in_markdown(decision_sentence(result.decision)),
        *warning,
        "",
    ])  # fmt: skip
