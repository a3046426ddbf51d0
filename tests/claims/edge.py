"""Exported models beside their torch networks, judged as deployed, on X-rays and malaria cells.

    python tests/claims/edge.py --xrays SHARDS --malaria SHARDS --weights FILE.safetensors

jobs/train_at.py trains every network on every dataset (MobileNet-V2 from the file of weights, the
others from random weights), and jobs/export_edge.py exports it in float32 and int8 for both back
ends. What is done is not done again, and an interrupted training goes on. Prints a table after
each export, and writes all of them as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medspark.job import write_result

JOBS = Path(__file__).resolve().parents[2] / "jobs"
NETWORKS = ("mobilenetv2_100", "resnet50", "densenet121")
FROM_WEIGHTS = "mobilenetv2_100"
# How far an int8 model may lie from its torch network: clean AUROC, worst-case accuracy, and the
# least share of equal answers.
GOALS = {"auroc": 0.005, "worst": 0.02, "same": 0.99}
_ROUNDING = 1e-9
_TITLES = (
    "data", "network", "back end", "clean AUROC", "worst case (%)", "same answers (%)", "MB",
    "flags",
)  # fmt: skip


def job(name: str, master: str, *words: object) -> None:
    """Run a job of medspark. Raises CalledProcessError if it fails."""
    submit = Path(sys.executable).with_name("spark-submit")
    command = [submit, JOBS / f"{name}.py", "--spark.master", master, *words]
    subprocess.run([str(word) for word in command], check=True)


def export(data: str, network: str, shards: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Train and export a network, unless that is done; return the result of the export."""
    place = (asked.folder / f"{data}-{network}").resolve()
    result, run, track = place / "export.json", place / "run", f"sqlite:///{place}/mlflow.db"
    place.mkdir(parents=True, exist_ok=True)
    common = ("--track.uri", track, "--track.log_model", "false")
    if not (place / "training.json").exists():
        weights = ("--model.weights", asked.weights) if network == FROM_WEIGHTS else ()
        job(
            "train_at", asked.master,
            *("--shards", shards, "--model.name", network, *weights, "--attack.eps", "2/255"),
            *("--train.epochs", asked.epochs, "--launch.processes", 1, "--run_dir", run),
            *("--evaluate.eps", "2/255", "--evaluate.images", asked.images),
            *("--resume", "auto", "--output", place / "training.json", *common),
        )  # fmt: skip
    if not result.exists():
        job(
            "export_edge", asked.master,
            *("--config", JOBS.parent / "conf/jobs/export_edge.yaml", "--shards", shards),
            *("--model", run / "model", "--images", asked.images, "--folder", place / "exports"),
            *("--output", result, "--track.uri", track, "--track.log_model", "false"),
        )  # fmt: skip
    return {"data": data, "network": network} | json.loads(result.read_text(encoding="utf-8"))


def figures(cell: Mapping[str, Any], artifact: Mapping[str, Any]) -> dict[str, float]:
    """Return how far an artifact lies from its torch network."""
    twin = cell["twin"]
    return {
        "auroc": abs(artifact["clean"]["auroc"] - twin["clean"]["auroc"]),
        "worst": abs(artifact["worst_case"][0]["accuracy"] - twin["worst_case"][0]["accuracy"]),
        "same": artifact["parity"]["same_answers"],
    }


def missed(found: Mapping[str, float]) -> set[str]:
    """Return the goals that ``found`` misses."""
    # The figures are counts over counts: a distance that is the goal itself does not miss it.
    names = {name for name in ("auroc", "worst") if found[name] > GOALS[name] + _ROUNDING}
    return names | ({"same"} if found["same"] < GOALS["same"] - _ROUNDING else set())


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the int8 exports as a Markdown table; a figure that misses its goal is bold."""
    lines = [f"| {' | '.join(_TITLES)} |", "| --- | --- | --- |" + " --- |" * (len(_TITLES) - 3)]
    for cell in cells:
        twin = cell["twin"]
        for artifact in cell["artifacts"]:
            if artifact["precision"] != "int8":
                continue
            found = figures(cell, artifact)
            shown = {
                "auroc": _pair(twin["clean"]["auroc"], artifact["clean"]["auroc"], 1, 4),
                "worst": _pair(
                    twin["worst_case"][0]["accuracy"], artifact["worst_case"][0]["accuracy"], 100, 1
                ),
                "same": f"{100 * found['same']:.1f}",
            }
            shown |= {name: f"**{shown[name]}**" for name in missed(found)}
            flags = sum(flag["triggered"] for flag in artifact["flags"])
            row = (
                cell["data"], cell["network"], artifact["backend"], *shown.values(),
                f"{artifact['bytes'] / 1e6:.1f}", str(flags),
            )  # fmt: skip
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, "", *map(_float_parity, cells)])


def _pair(twin: float, artifact: float, scale: float, digits: int) -> str:
    return f"{scale * twin:.{digits}f} → {scale * artifact:.{digits}f}"


def _float_parity(cell: Mapping[str, Any]) -> str:
    far = max(
        artifact["parity"]["largest_difference"]
        for artifact in cell["artifacts"]
        if artifact["precision"] == "fp32"
    )
    return f"{cell['data']}, {cell['network']}: float32 differs by at most {far:.1e} in probability"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--xrays", type=Path, help="shards of the chest X-rays; default: left out")
    parser.add_argument("--malaria", type=Path, help="shards of the cells; default: left out")
    parser.add_argument("--weights", type=Path, help=f"first weights of {FROM_WEIGHTS}")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="separated by commas")
    parser.add_argument("--epochs", type=int, default=4, help="of each training")
    parser.add_argument("--images", type=int, default=300, help="test images that are attacked")
    parser.add_argument("--master", default="local[1]", help="Spark's master")
    parser.add_argument("--folder", type=Path, default=Path("build/edge"), help="of runs, exports")
    parser.add_argument("--output", type=Path, default=Path("build/edge.json"))
    asked = parser.parse_args(argv)
    if FROM_WEIGHTS in asked.networks.split(",") and asked.weights is None:
        parser.error(f"{FROM_WEIGHTS} starts from --weights FILE.safetensors")
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    """Do the exports that are missing, and print and write the table after each."""
    asked = arguments(argv)
    given = {"xrays": asked.xrays, "malaria": asked.malaria}
    cells: list[dict[str, Any]] = []
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    for network in asked.networks.split(","):
        for data, shards in given.items():
            if shards is not None:
                cells.append(export(data, network, shards.resolve(), asked))
                write_result(asked.output, {"epochs": asked.epochs, "cells": cells})
                print(table(cells), flush=True)


if __name__ == "__main__":
    main()
