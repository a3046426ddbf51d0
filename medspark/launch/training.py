"""Train on shards from Spark: what jobs/train_at.py does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
from pydantic import Field
from pyspark.sql import SparkSession

from medspark.attacks.threat import ThreatModel
from medspark.data.config import DataConfig, check_data
from medspark.evaluate.config import EvaluateConfig
from medspark.ingest.session import SparkConfig, spark_session
from medspark.job import JobConfig
from medspark.launch.demo import DemoConfig, demo_shards, ingest_sum
from medspark.launch.distributor import (
    SPARK_SETTINGS,
    LaunchConfig,
    Launched,
    Task,
    check_room,
    run_ddp,
)
from medspark.launch.model_card import model_card
from medspark.launch.progress import progress
from medspark.launch.table import robustness_table
from medspark.models.card import read_card
from medspark.models.config import PRETRAINED, ModelConfig, check_model, check_weights
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.shards.plan import EpochPlan
from medspark.track.config import TrackConfig
from medspark.track.journal import JournalReader
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, ModelEntry, RunEntry
from medspark.train.config import CheckpointConfig, FitConfig, TrainConfig, check_ranks

# Torch, timm and MLflow take seconds to import: only where they are needed, beside the start of
# Spark and of the ranks, and never for --help.
if TYPE_CHECKING:
    from medspark.models.classifier import Classifier

__all__ = ["TrainAtConfig", "check", "fetch_classifier", "summary", "train_at", "train_once"]

# How a row of the table is called that no robustness was trained into.
_NO_DEFENCE = {"standard": "undefended", "kd": "student (kd)", "defensive": "student (defensive)"}

# What every rank runs, by name.
_FIT = "medspark.train.loop:fit"

# What a run leaves in its folder; all of it goes when the run is begun anew.
_PARTS = ("attempts", "checkpoints", "journal", "model", "plain", "report")


class TrainAtConfig(JobConfig):
    """Adversarial fine-tuning of one classifier on one dataset of shards."""

    shards: Path | None = Field(
        None, description="folder that jobs/shard.py wrote; built-in demo data by default"
    )
    run_dir: Path | None = Field(
        None,
        description="folder for checkpoints, logs and the model, shared by all machines; beside "
        "the output by default",
    )
    baseline: bool = Field(
        False, description="also train without attacks first, and report both side by side"
    )
    model: ModelConfig = ModelConfig()
    attack: ThreatModel = ThreatModel()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: int = Field(0, ge=0, description="of the weights, the order of images and all noise")
    resume: Literal["auto", "never"] = Field(
        "never", description="auto goes on with the interrupted run in run_dir, if there is one"
    )
    launch: LaunchConfig = LaunchConfig()
    spark: SparkConfig = SparkConfig()
    track: TrackConfig = TrackConfig()
    demo: DemoConfig = DemoConfig()


def train_at(config: TrainAtConfig) -> dict[str, Any]:
    """Train as ``config`` says and return the result document.

    Raises UsageError for whatever is wrong with the configuration or the shards before Spark
    starts, with the network while it starts, and RunError, naming the rank and the cause, for
    training that failed.
    """
    check(config)
    folder = config.run_dir or (config.output or Path("build/results/train_at.json"))
    folder = (folder if config.run_dir else folder.with_suffix(".run")).resolve()
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(update={"settings": settings})

    def check_name() -> None:
        # A run that goes on was checked when it began.
        if config.resume == "never" or not any((folder / "checkpoints").glob("step-*")):
            check_model(config.model)

    # To import timm takes as long as Spark to start.
    with (
        _beside(check_name) as checked,
        spark_session(spark_config, name="medspark train_at") as spark,
    ):
        checked()
        if config.resume == "never":
            _clear(folder)
        before: dict[str, Any] = {}
        if config.shards is None:
            shards, before["ingest"] = demo_shards(spark, config.demo)
            config = config.model_copy(update={"shards": shards})
        if config.baseline:
            plain = config.train.model_copy(update={"mode": "standard"})
            undefended = config.model_copy(update={"train": plain})
            before["baseline"] = train_once(undefended, spark, folder / "plain")
        result = train_once(config, spark, folder)
        if not before:
            # What came before the launch was Spark's own start and nothing else.
            submitted = result["launch"]["launched_at"] - _submitted_at()
            result["startup"] = {"submit": submitted, **result["startup"]}
        return result | before


def check(config: TrainAtConfig) -> None:
    """Raise UsageError for what can be found wrong before Spark starts, and without timm."""
    check_room(config.launch, config.spark.master)
    check_ranks(config.train, config.launch.processes)
    if config.shards is not None:
        verify(config.shards, read_manifest(config.shards), contents=False)
    check_data(config.data)
    check_weights(config.model)


@contextmanager
def _beside(work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Do ``work`` in a thread; what is yielded waits for its end, and raises what it raised."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work).result


def summary(result: Mapping[str, Any]) -> str:
    """Return what a person wants to read at the end: robustness, the ingest sum, the dashboard."""
    mode = result["mode"]
    name = _NO_DEFENCE.get(mode, f"defended ({mode})")
    rows = {"undefended": result["baseline"]} if "baseline" in result else {}
    lines = ["", "Accuracy on the test images (%)", "", robustness_table(rows | {name: result}), ""]
    if "ingest" in result:
        lines.append(ingest_sum(result["ingest"]))
    if "submit" in result["startup"]:
        parts = {name: took for name, took in result["startup"].items() if name != "total"}
        said = ", ".join(f"{name.replace('_', ' ')} {took:.1f}" for name, took in parts.items())
        lines.append(f"First step {sum(parts.values()):.1f} s after spark-submit: {said}")
    store = result["mlflow"]["uri"]
    if store.startswith("sqlite:"):
        lines.append(f"Dashboard: make ui    (mlflow ui --backend-store-uri {store})")
    else:
        lines.append(f"Dashboard: {store}")
    return "\n".join(lines)


def fetch_classifier(model_uri: str, *, uri: str | None = None) -> Classifier:
    """Return the classifier that a run logged as ``models:/…``, to be trained on or asked."""
    from medspark.models.checkpoint import load_classifier
    from medspark.track.models import fetch_model

    return load_classifier(fetch_model(model_uri, uri=uri))


def train_once(
    config: TrainAtConfig,
    spark: SparkSession,
    folder: Path,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    measure: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None,
    timed_only: bool = False,
) -> dict[str, Any]:
    """Train one network on ``config.shards`` in a running session; leave all of it in ``folder``.

    The run in MLflow gets ``params`` and ``tags`` beside its own, and what ``measure`` makes of the
    result; ``timed_only`` keeps figures of the network itself out of it. Returns the result
    document. Raises UsageError for input that cannot be used, and
    RunError, naming the rank and the cause, for training that failed.
    """
    check_ranks(config.train, config.launch.processes)
    fit_config = _fit_config(config, folder)
    manifest = read_manifest(fit_config.shards)
    entry = _entry(config, manifest)
    entry = entry.model_copy(
        update={"params": dict(params or {}), "tags": entry.tags | dict(tags or {})}
    )
    with tracked(folder, config.track, entry) as run:
        task = Task(
            function=_FIT,
            config=fit_config,
            run_dir=folder,
            journal=run.spool.journal,
            checkpoints=folder / "checkpoints",
            most_ranks=config.train.most_ranks,
        )
        steps = (
            config.train.epochs
            * EpochPlan(manifest.splits["train"].rows, config.train.batch_size, config.seed).steps
        )
        with progress(run.spool.journal, steps=steps, name=config.train.mode):
            result, launched = run_ddp(task, spark=spark, launch=config.launch)
        result |= {"startup": _startup(result["timeline"], launched)}
        figures = _cost(result) | _speed(run.spool.journal) | {"restarts": launched.restarts}
        if not timed_only:
            figures |= _robustness(result)
        keep_model = config.track.log_model and not timed_only
        run.end(
            "FINISHED",
            params={"world_size": launched.processes, "threads_per_rank": launched.threads},
            summary=figures | dict(measure(result) if measure else {}),
            artifacts=None if timed_only else _write_report(folder, result, manifest),
            model=_model_entry(folder, manifest, config, result) if keep_model else None,
            patience_seconds=config.track.patience_seconds,
        )
    return result | {"launch": launched.model_dump(), "mlflow": run.reference}


def _fit_config(config: TrainAtConfig, folder: Path) -> FitConfig:
    assert config.shards is not None, "the demo's shards have been made"
    model = config.model
    if model.weights not in (None, PRETRAINED):
        # The ranks work in folders of their own.
        model = model.model_copy(update={"weights": str(Path(str(model.weights)).resolve())})
    # What the jobs and the training call by the same name is the same thing.
    shared = {
        name: getattr(config, name) for name in FitConfig.model_fields if hasattr(config, name)
    }
    placed = {"shards": config.shards.resolve(), "run_dir": folder, "model": model}
    return FitConfig(**(shared | placed))


def _entry(config: TrainAtConfig, manifest: Manifest) -> RunEntry:
    return RunEntry(
        name=f"{config.model.name} {config.train.mode}",
        config=config.model_dump(mode="json"),
        tags={"medspark.job": "train_at", "medspark.mode": config.train.mode},
        dataset=DatasetEntry(
            name=Path(str(config.shards)).name, digest=manifest.digest, source=str(config.shards)
        ),
    )


def _model_entry(
    folder: Path, manifest: Manifest, config: TrainAtConfig, result: Mapping[str, Any]
) -> ModelEntry:
    return ModelEntry(
        folder=folder / "model",
        loader="medspark.models.predictor:Predictor.load",
        input_shape=(manifest.height, manifest.width, manifest.channels),
        outputs=len(manifest.classes),
        file_loader="medspark.models.file_predictor:FilePredictor.load",
        classes=manifest.classes,
        card=model_card(result, manifest, read_card(folder / "model")),
        register_as=config.track.register_as,
        alias=config.track.alias,
    )


def _cost(result: Mapping[str, Any]) -> dict[str, float]:
    """Return speed, memory and start-up under the names that MLflow shows."""
    kept = ("images_per_second", "data_wait_share", "communication_share", "peak_memory_mb")
    figures = {key: float(result[key]) for key in kept}
    return figures | {f"startup/{part}_seconds": took for part, took in result["startup"].items()}


def _robustness(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the test images under the names that MLflow shows."""
    figures = {f"test/clean/{key}": value for key, value in result["clean"].items()}
    for attack in [*result["attacks"], *result["worst_case"]]:
        prefix = f"test/{attack['name']}/eps_{attack['eps_255']:g}"
        figures |= {f"{prefix}/{key}": value for key, value in attack.items()}
    unwanted = ("steps", "eps_255")
    return {
        key: float(value)
        for key, value in figures.items()
        if isinstance(value, int | float) and not key.endswith(unwanted)
    }


def _submitted_at() -> float:
    """Return when spark-submit was started, or this process where it was not."""
    own = psutil.Process()
    above = own.parent()
    if above is not None and "java" in above.name():
        return float(above.create_time())
    return float(own.create_time())


def _startup(moments: Mapping[str, float], launched: Launched) -> dict[str, float]:
    """Return the seconds from the launch to the end of the first step, in all and by part."""
    ends = {
        "spawn": launched.ranks_at,  # Spark, torchrun, interpreters
        "join": moments["joined"],  # import of torch, process group
        "open": moments["opened"],
        "build": moments["built"],
        "first_step": moments.get(
            "stepped", moments["trained"]
        ),  # none is left of some resumed runs
    }
    begins = [launched.launched_at, *ends.values()]
    parts = {name: end - begin for (name, end), begin in zip(ends.items(), begins, strict=False)}
    return parts | {"total": sum(parts.values())}


def _speed(journal: Path) -> dict[str, float]:
    """Return the usual speed and the slow end of it: far apart, they betray a straggling rank."""
    speeds = [
        record.metrics["images_per_second"]
        for record in JournalReader(journal).poll()
        if "images_per_second" in record.metrics
    ]
    if not speeds:
        return {}
    slow, usual = np.percentile(speeds, [5, 50])
    return {"images_per_second/p5": float(slow), "images_per_second/p50": float(usual)}


def _write_report(run_folder: Path, result: Mapping[str, Any], manifest: Manifest) -> Path:
    folder = run_folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    card = model_card(result, manifest, read_card(run_folder / "model"))
    (folder / "result.json").write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    (folder / "robustness.md").write_text(robustness_table({"": result}), encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return folder


def _clear(folder: Path) -> None:
    """Remove what an earlier run left in ``folder``, and nothing else."""
    for part in _PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "run.json").unlink(missing_ok=True)
