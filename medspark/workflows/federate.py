"""Federated training on Spark: jobs/federate.py."""

from __future__ import annotations

import json
from pathlib import Path

from medspark import ownership
from medspark.errors import UsageError
from medspark.evaluate.config import check_attacks
from medspark.federate.adversary.config import check_adversary
from medspark.federate.folder import FEDERATION_FILES
from medspark.federate.partition import clients_of
from medspark.federate.privacy import check_privacy
from medspark.federate.result import FederationResult
from medspark.federate.server import Executor
from medspark.files import json_digest, write_whole
from medspark.models.card import PLAIN, read_card
from medspark.models.config import check_model, check_weights, model_folder
from medspark.models.image_size import check_images
from medspark.shards.manifest import Manifest, read_manifest, verify
from medspark.spark.session import spark_session
from medspark.track.runs import tracked
from medspark.track.spool import DatasetEntry, RunEntry
from medspark.train.run_folder import (
    RUN_FILES,
    check_run_folder,
    held_run,
    keep_result,
    kept_result,
)
from medspark.workflows import figures
from medspark.workflows.federate_config import FederateConfig
from medspark.workflows.federate_report import describe_federation
from medspark.workflows.federation import Federation, rows_in
from medspark.workflows.model_description import model_entry

__all__ = ["federate", "run_federation"]


def federate(config: FederateConfig) -> FederationResult:
    """Run the federation that ``config`` describes and return the result document.

    Raises UsageError for an error in the configuration or the shards, and RunError if too few
    clients answer in a round or the tasks fail.
    """
    manifest = check(config)
    output = config.output or Path("build/results/federate.json")
    place = (config.run_dir or output.with_suffix(".run")).resolve()
    if config.overwrite and config.resume == "auto":
        raise UsageError("overwrite begins a run anew and resume auto goes on with it: give one.")
    fixed = config.run_dir is not None
    check_run_folder(place, fixed=fixed, shards=config.shards, model=config.model)
    edge = config.adversary.edge
    if edge is not None and Path(edge).is_dir():
        ownership.apart({"adversary.edge": edge}, {"the folder of the run": place})
    files = (*RUN_FILES, *FEDERATION_FILES)
    with held_run(
        place, fixed=fixed, resume=config.resume, overwrite=config.overwrite, files=files
    ) as folder:
        digests = _digests(config, manifest)
        if config.resume == "auto":
            kept = kept_result(folder, **digests)
            if kept is not None:
                return FederationResult.model_validate(kept)
        _check_settings(folder, digests["run"])
        federation = Federation(config, folder, manifest)
        write_whole(folder / "settings.json", json.dumps({"run": digests["run"]}))
        federation.begin()
        # Spark's own bar would show one stage from the first round to the last.
        quiet = {"spark.ui.showConsoleProgress": "false"} | config.spark.settings
        spark_config = config.spark.model_copy(update={"settings": quiet})
        with (
            spark_session(spark_config, name="medspark federate") as spark,
            federation.executor(spark) as executor,
        ):
            result = run_federation(federation, executor)
        keep_result(folder, result.as_json(), **digests)
        return result


def check(config: FederateConfig) -> Manifest:
    """Return the manifest of the shards. Raises UsageError for every mistake in ``config``."""
    manifest = read_manifest(config.shards)
    verify(config.shards, manifest, contents=False)
    check_weights(config.model)
    check_model(config.model)
    check_images(config.model, manifest)
    folder = model_folder(config.model)
    if folder is not None and read_card(folder, kinds=PLAIN).pruning is not None:
        raise UsageError(
            f"model.weights: '{folder}' is pruned, and clients do not keep its zeros and widths."
        )
    check_attacks(config.evaluate.attacks, gradients=True, surrogates=0)
    config.decision.check(manifest)
    if config.privacy is not None:
        check_privacy()
    _check_splits(config, manifest)
    clients = clients_of(config.clients, manifest.splits["train"])
    per_round = config.clients.in_round(clients)
    config.rule_for(clients).check_round(per_round)
    check_adversary(config.adversary, manifest, clients=clients, per_round=per_round)
    return manifest


def _check_splits(config: FederateConfig, manifest: Manifest) -> None:
    for split in ("train", "test"):
        if not rows_in(manifest, split):
            raise UsageError(f"The shards in {config.shards} have no {split} images.")
    if not rows_in(manifest, "val"):
        if config.aggregate == "fltrust":
            raise UsageError("fltrust trains on validation images, and these shards have none.")
        if config.batch_norm == "reestimate":
            raise UsageError(
                "batch_norm reestimate computes statistics from validation images, and these "
                "shards have none."
            )
    if config.calibrate != "none" and manifest.multi_label:
        raise UsageError(
            f"calibrate {config.calibrate} is for images of one class each, and these have "
            "findings."
        )


def run_federation(federation: Federation, executor: Executor) -> FederationResult:
    """Run a federation from its last finished round, and return the result.

    ``executor`` trains the clients. The run is in MLflow from here on, so mistakes of the user
    have been found before.
    """
    config, manifest = federation.config, federation.manifest
    folder = federation.place
    with tracked(folder, config.track, _entry(config, manifest)) as run:
        result = federation.run(executor, run)
        metrics = figures.robustness(result) | figures.compared(result, eps=config.attack.eps)
        metrics |= {"clients": result.clients, "federation_seconds": result.seconds}
        if result.epsilon is not None:
            metrics["epsilon"] = result.epsilon
        run.end(
            "FINISHED",
            params={"spark_tasks": result.tasks},
            summary=metrics,
            artifacts=folder / "report",
            model=model_entry(
                folder / "model", manifest, config.track, card=describe_federation(result)
            )
            if config.track.log_model
            else None,
            patience_seconds=config.track.patience_seconds,
        )
    return result.model_copy(update={"mlflow": run.reference})


def _check_settings(folder: Path, digest: str) -> None:
    """Raise UsageError if an unfinished federation in ``folder`` has other deciding settings."""
    file = folder / "settings.json"
    if file.exists() and json.loads(file.read_text())["run"] != digest:
        raise UsageError(
            f"{folder} holds a federation with other data or another configuration: use another "
            "--run_dir, or --overwrite to start again there."
        )


def _digests(config: FederateConfig, manifest: Manifest) -> dict[str, str]:
    """Return two hashes: ``run`` of the settings that decide the weights, ``asked`` of all."""
    dataset = {"dataset": manifest.digest}
    asked = config.model_dump(mode="json", exclude=set(config.decides_nothing))
    if config.decision.criterion is None:
        del asked["decision"]  # runs of versions without decisions keep their hash
    return {
        "run": json_digest(config.deciding_weights() | dataset),
        "asked": json_digest(asked | dataset),
    }


def _entry(config: FederateConfig, manifest: Manifest) -> RunEntry:
    return RunEntry(
        name=f"federate {config.model.name} {config.aggregate} {config.train.mode}",
        config=config.model_dump(mode="json"),
        params={
            "model": config.model.name,
            "mode": config.train.mode,
            "aggregate": config.aggregate,
            "adversary": config.adversary.name,
        },
        tags={"medspark.job": "federate", "medspark.mode": config.train.mode},
        dataset=DatasetEntry(
            name=Path(str(config.shards)).name, digest=manifest.digest, source=str(config.shards)
        ),
    )
