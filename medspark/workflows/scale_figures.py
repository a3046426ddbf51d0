"""Compute the figures and projections of a sweep from the measurements of its cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from medspark.models.backbones import build
from medspark.shards.manifest import Manifest
from medspark.study.laws import Cluster, Projection, StepModel, project
from medspark.study.sweep import Sweep
from medspark.train.result import TrainResult
from medspark.workflows.scale_grid import ScaleAtConfig

__all__ = ["assumed_cluster", "gradient_bytes", "judged_figures", "parent_figures", "projected"]


def judged_figures(result: TrainResult) -> dict[str, float | None]:
    """Return a network's clean AUROC and accuracy, and its worst case at the largest eps."""
    worst = result.worst_case
    return {
        "clean_auroc": result.clean.auroc,
        "clean_accuracy": result.clean.accuracy,
        "worst_case_accuracy": worst[-1].accuracy if worst else None,
    }


def gradient_bytes(config: ScaleAtConfig, name: str, manifest: Manifest) -> float:
    """Return the bytes of gradients that the ranks exchange per step of the network ``name``."""
    model = config.model.model_copy(update={"name": name, "weights": None})
    network = build(
        model,
        num_classes=len(manifest.classes),
        channels=manifest.channels,
        size=(manifest.height, manifest.width),
    )
    return float(sum(4 * p.numel() for p in network.parameters() if p.requires_grad))


def assumed_cluster(config: ScaleAtConfig, startups: list[float]) -> Cluster:
    """Return the assumed cluster; its start-up is the measured median (s) unless configured."""
    assumed = config.project.model_dump(include=set(Cluster.model_fields))
    if startups and "startup_seconds" not in config.project.model_fields_set:
        assumed["startup_seconds"] = statistics.median(startups)
    return Cluster(**assumed)


def projected(config: ScaleAtConfig, model: StepModel, cluster: Cluster) -> Iterator[Projection]:
    """Yield a projection for every data size and every number of machines."""
    for images in config.project.images:
        for nodes in config.project.nodes:
            yield project(
                model,
                cluster,
                nodes=nodes,
                images=images,
                epochs=config.train.epochs,
                batch=config.project.batch,
                largest_batch=config.project.largest_batch,
            )


def parent_figures(sweep: Sweep) -> dict[str, float]:
    """Return the figures of the whole sweep for its parent run in MLflow."""
    figures: dict[str, float] = {}
    for curve in sweep.curves:
        name = f"{curve.scaling} {curve.model} {curve.mode}".replace("+", " ")
        for world, value in curve.efficiencies.items():
            if world > 1:
                figures[f"sweep/efficiency on {world} {name}"] = value
    return figures
