"""Train on shards from Spark: jobs/train_at.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from pyspark.sql import SparkSession

from medspark.data.config import check_data
from medspark.errors import UsageError
from medspark.evaluate.operating_point import decision_lines
from medspark.files import json_digest
from medspark.job import write_result
from medspark.launch.distributor import (
    SPARK_SETTINGS,
    Task,
    check_room,
    run_ddp,
)
from medspark.models.card import read_card
from medspark.models.config import (
    PRETRAINED,
    check_model,
    check_weights,
    model_folder,
)
from medspark.models.image_size import check_images
from medspark.remote import AnyPath, any_path
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.shards.plan import EpochPlan
from medspark.spark.session import spark_session
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, RunEntry
from medspark.train.combinations import check_combinations
from medspark.train.config import FitConfig, TrainingSettings, check_ranks, known_before
from medspark.train.kinds import recipe_line, with_recipe
from medspark.train.result import TrainResult
from medspark.train.run_folder import check_run_folder, held_run, keep_result, kept_result
from medspark.workflows import figures
from medspark.workflows.demo import DemoConfig, check_demo, demo_folder, demo_shards, ingest_sum
from medspark.workflows.job_settings import SparkTrainingConfig
from medspark.workflows.lineage import lineage
from medspark.workflows.model_description import describe_model, model_entry
from medspark.workflows.progress import progress
from medspark.workflows.robustness_table import flag_lines, robustness_table

# Torch, timm and MLflow take seconds to import. They are imported only when needed, while Spark and
# the ranks start, and never for --help.
__all__ = ["TrainAtConfig", "check", "summary", "train_at", "train_once"]

_LOGGER = logging.getLogger(__name__)

# Names of the table's rows for modes that train no robustness.
_NO_DEFENCE = {"standard": "undefended", "kd": "student (kd)", "defensive": "student (defensive)"}


class TrainAtConfig(SparkTrainingConfig, TrainingSettings):
    """Adversarial fine-tuning of one classifier on one dataset of shards."""

    # The function that every rank runs, its configuration, and its result.
    rank_function: ClassVar[str] = "medspark.train.loop:fit"
    rank_config: ClassVar[type[FitConfig]] = FitConfig
    result_class: ClassVar[type[TrainResult]] = TrainResult
    # Whether the network itself learns, so that its kind chooses the recipe.
    chooses_recipe: ClassVar[bool] = True

    decides_report: ClassVar = frozenset({"baseline"})
    decides_nothing: ClassVar = frozenset({
        "output", "shards", "run_dir", "resume", "overwrite", "launch", "spark", "track", "demo",
    })  # fmt: skip

    shards: AnyPath | None = Field(
        None, description="folder that jobs/shard.py wrote; built-in demo data by default"
    )
    run_dir: Path | None = Field(
        None,
        description="folder for checkpoints, logs and the model, shared by all machines; by "
        "default a new one beside the output: x.run, x-2.run, ...",
    )
    baseline: bool = Field(
        False, description="first train without attacks too, and report both side by side"
    )
    resume: Literal["auto", "never"] = Field(
        "never",
        description="auto resumes an interrupted run in run_dir, and returns the result of a "
        "finished one",
    )
    overwrite: bool = Field(
        False, description="replace the run in run_dir, finished or not; other files there stay"
    )
    demo: DemoConfig = DemoConfig()


def train_at(config: TrainAtConfig) -> TrainResult:
    """Train as ``config`` says and return the result document.

    Raises UsageError for an error in the configuration or the shards before Spark starts, and in
    the network while Spark starts. Raises RunError, naming the rank and the cause, if the training
    fails.
    """
    asked, config = config, _with_recipe(config)
    check(config)
    _tell_recipe(asked)
    place, demo = _place(config), demo_folder(config.demo) if config.shards is None else None
    _check_folders(config, place)
    with held_run(
        place,
        fixed=config.run_dir is not None,
        resume=config.resume,
        overwrite=config.overwrite,
        demo=demo,
    ) as folder:
        return _kept(config, folder) or _run(config, folder)


def _with_recipe(config: TrainAtConfig) -> TrainAtConfig:
    return with_recipe(config) if config.chooses_recipe else config


def _tell_recipe(config: TrainAtConfig) -> None:
    """Log what is chosen for the network of ``config``, which has no recipe yet."""
    if config.chooses_recipe and (line := recipe_line(config)):
        _LOGGER.info("%s", line)


def _run(config: TrainAtConfig, folder: Path) -> TrainResult:
    settings = SPARK_SETTINGS | config.spark.settings
    spark_config = config.spark.model_copy(update={"settings": settings})
    asked = config

    def check_name() -> None:
        # A resumed run was checked when it began.
        if not any((folder / "checkpoints").glob("step-*")):
            check_model(config.model)
            if config.shards is not None:
                check_images(config.model, read_manifest(config.shards))

    # Importing timm takes as long as starting Spark.
    with (
        _beside(check_name) as checked,
        spark_session(spark_config, name="medspark train_at") as spark,
    ):
        checked()
        before: dict[str, Any] = {}
        if config.shards is None:
            shards, before["ingest"] = demo_shards(spark, config.demo)
            config = config.model_copy(update={"shards": shards})
        if config.baseline:
            plain = config.train.model_copy(update={"mode": "standard", "awp": 0.0})
            undefended = config.model_copy(update={"train": plain})
            before["baseline"] = _plain(undefended, spark, folder / "plain")
        result = train_once(config, spark, folder)
        if not before:
            # Only the start of Spark came before the launch.
            submitted = result.launch["launched_at"] - figures.submitted_at()
            before["startup"] = {"submit": submitted, **result.startup}
        result = result.model_copy(update=before)
        keep_result(folder, result.as_json(), **_digests(asked))
        return result


def _plain(config: TrainAtConfig, spark: SparkSession, folder: Path) -> TrainResult:
    """Return the result of the training without attacks, kept from an interrupted run or new."""
    if (kept := _kept(config, folder)) is not None:
        return kept
    result = train_once(config, spark, folder)
    keep_result(folder, result.as_json(), **_digests(config))
    return result


def _kept(config: TrainAtConfig, folder: Path) -> TrainResult | None:
    if config.resume == "never":
        return None
    kept = kept_result(folder, **_digests(config))
    return None if kept is None else config.result_class.model_validate(kept)


def _digests(config: TrainAtConfig) -> dict[str, str]:
    """Return two hashes: ``run`` of the settings that decide the weights, ``asked`` of all."""
    data = config.shards and read_manifest(config.shards).digest
    dataset = {"dataset": data or config.demo.model_dump(mode="json")}
    # A run trains one network, or two with a baseline.
    run = config.deciding_weights() | {"baseline": config.baseline}
    asked = config.model_dump(mode="json", exclude=set(config.decides_nothing))
    if config.decision.criterion is None:
        del asked["decision"]  # runs of versions without decisions keep their hash
    asked["train"] = known_before(asked["train"])
    return {"run": json_digest(run | dataset), "asked": json_digest(asked | dataset)}


def _place(config: TrainAtConfig) -> Path:
    """Return the configured folder of the run, or else the first default one."""
    output = config.output or Path("build/results/train_at.json")
    return (config.run_dir or output.with_suffix(".run")).resolve()


def _check_folders(config: TrainAtConfig, place: Path) -> None:
    """Raise UsageError if the run would write to its inputs, or to a folder not medspark's."""
    if config.overwrite and config.resume == "auto":
        raise UsageError("overwrite begins a run anew and resume auto goes on with it: give one.")
    check_run_folder(
        place,
        fixed=config.run_dir is not None,
        shards=config.shards or demo_folder(config.demo),
        model=config.model,
        distill=getattr(config, "distill", None),
    )
    if config.shards is None:
        check_demo(config.demo)


def check(config: TrainAtConfig) -> None:
    """Raise UsageError for every mistake that shows before Spark starts and without timm."""
    check_room(config.launch, config.spark.master)
    check_ranks(config.train, config.launch.processes)
    multi_label = False
    if config.shards is not None:
        manifest = read_manifest(config.shards)
        verify(config.shards, manifest, contents=False)
        config.decision.check(manifest)
        multi_label = manifest.multi_label
    check_combinations(config, multi_label=multi_label)
    check_data(config.data)
    check_weights(config.model)


@contextmanager
def _beside(work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Do ``work`` in a thread; yield a function that waits for it and raises its exception."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work).result


def summary(result: TrainResult) -> str:
    """Return the text printed at the end: the robustness table, ingest counts, the dashboard."""
    pruned = result.sparsity is not None
    name = _NO_DEFENCE.get(result.mode, f"{'pruned' if pruned else 'defended'} ({result.mode})")
    rows = {} if result.baseline is None else {"undefended": result.baseline}
    rows |= {name: result}
    lines = [
        "",
        "Accuracy on the test images (%)",
        "",
        robustness_table(rows),
        *flag_lines(rows),
        "",
    ]
    if result.decision is not None:
        lines += [*decision_lines(result), ""]
    lines.append(f"Model: {result.model}")
    if result.ingest is not None:
        lines.append(ingest_sum(result.ingest))
    if "submit" in result.startup:
        parts = {name: took for name, took in result.startup.items() if name != "total"}
        listed = ", ".join(f"{name.replace('_', ' ')} {took:.1f}" for name, took in parts.items())
        lines.append(f"First step {sum(parts.values()):.1f} s after spark-submit: {listed}")
    store = result.mlflow["uri"]
    if store.startswith("sqlite:"):
        lines.append(f"Dashboard: make ui    (mlflow ui --backend-store-uri {store})")
    else:
        lines.append(f"Dashboard: {store}")
    return "\n".join(lines)


def train_once(
    config: TrainAtConfig,
    spark: SparkSession,
    folder: Path,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    measure: Callable[[TrainResult], Mapping[str, float]] | None = None,
    timed_only: bool = False,
) -> TrainResult:
    """Train one network on ``config.shards`` in a running session; write all files to ``folder``.

    The MLflow run gets ``params``, ``tags`` and the metrics that ``measure`` returns, besides the
    usual ones; ``timed_only`` leaves out the network's robustness, report and model. Returns the
    result document. Raises UsageError for unusable input, and RunError, naming the rank and the
    cause, if the training fails.
    """
    _tell_recipe(config)
    config = _with_recipe(config)
    check_ranks(config.train, config.launch.processes)
    fit_config = _fit_config(config, folder)
    manifest = read_manifest(fit_config.shards)
    entry = _entry(config, fit_config, manifest)
    entry = entry.model_copy(
        update={"params": entry.params | dict(params or {}), "tags": entry.tags | dict(tags or {})}
    )
    with tracked(folder, config.track, entry, after_first_record=True) as run:
        task = Task(
            function=config.rank_function,
            config=fit_config,
            run_dir=folder,
            journal=run.spool.journal,
            checkpoints=folder / "checkpoints",
            most_ranks=config.train.most_ranks,
        )
        rows = manifest.splits["train"].rows
        steps = fit_config.total_steps(EpochPlan(rows, config.train.batch_size, config.seed).steps)
        with progress(run.spool.journal, steps=steps, name=fit_config.mode):
            document, launched = run_ddp(task, spark=spark, launch=config.launch)
        result = config.result_class.model_validate(
            document | {"startup": figures.startup(document["timeline"], launched)}
        )
        metrics = (
            figures.cost(result)
            | figures.speed(run.spool.journal)
            | {"restarts": launched.restarts}
        )
        if not timed_only:
            metrics |= figures.robustness(result) | figures.pruning(result) | result.more_metrics()
            metrics |= figures.compared(result, eps=config.attack.eps)
        keep_model = config.track.log_model and not timed_only
        run.end(
            "FINISHED",
            params={"world_size": launched.processes, "threads_per_rank": launched.threads},
            summary=metrics | dict(measure(result) if measure else {}),
            artifacts=None if timed_only else _write_report(folder, result, manifest),
            model=model_entry(
                folder / "model",
                manifest,
                config.track,
                card=describe_model(result, manifest, read_card(folder / "model")),
            )
            if keep_model
            else None,
            patience_seconds=config.track.patience_seconds,
        )
    return result.model_copy(update={"launch": launched.model_dump(), "mlflow": run.reference})


def _fit_config(config: TrainAtConfig, folder: Path) -> FitConfig:
    assert config.shards is not None, "the demo's shards have been made"
    model = config.model
    if model.weights not in (None, PRETRAINED):
        # Each rank works in a different folder, so the path must be absolute.
        model = model.model_copy(update={"weights": str(any_path(str(model.weights)).resolve())})
    # Copy the fields that both configurations share.
    names = config.rank_config.model_fields
    shared = {name: getattr(config, name) for name in names if hasattr(config, name)}
    placed = {"shards": config.shards.resolve(), "run_dir": folder, "model": model}
    return config.rank_config(**(shared | placed))


def _entry(config: TrainAtConfig, fit_config: FitConfig, manifest: Manifest) -> RunEntry:
    distill = fit_config.distill
    sources = lineage(
        model=model_folder(config.model), teacher=None if distill is None else distill.teacher
    )
    return RunEntry(
        name=f"{config.model.name} {fit_config.mode}",
        config=config.model_dump(mode="json"),
        params={
            "model": config.model.name,
            "mode": fit_config.mode,
            "data_share": config.data.share,
        },
        tags={"medspark.job": "train_at", "medspark.mode": fit_config.mode} | sources,
        dataset=DatasetEntry(
            name=Path(str(config.shards)).name, digest=manifest.digest, source=str(config.shards)
        ),
    )


def _write_report(run_folder: Path, result: TrainResult, manifest: Manifest) -> Path:
    folder = run_folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    card = describe_model(result, manifest, read_card(run_folder / "model"))
    write_result(folder / "result.json", result.as_json())
    decided = ["", *decision_lines(result)] if result.decision is not None else []
    table = "\n".join([robustness_table({"": result}), *decided, *result.more_lines()])
    (folder / "robustness.md").write_text(table, encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return folder
