"""The finalists of tables of prunings under AutoAttack: dense, RSR, and the best rival at 85 %.

    python tests/claims/pruned.py --tables TABLE.json,TABLE.json --shards SHARDS --output FILE.json

Reads the result documents of jobs/prune_table.py, and runs jobs/evaluate.py on the networks of
three rows of each: the one that is not pruned, rsr, and the method with the best worst case among
the others that have as many seeds. A network that was judged in --folder is not judged again, not
even on another number of --images. Noisy networks are judged with and without their noise. Prints
a table, and writes it with all cells as JSON. --figure draws the cells of all tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medspark.evaluate.noise_result import NoiseResult
from medspark.job import write_result
from medspark.study.prune_report import PruneCell, prune_figure

JOBS = Path(__file__).resolve().parents[2] / "jobs"
ATTACKS = "pgd,pgd_margin,autoattack"
EPS = "2/255"
FIGURES = ("clean", "autoattack", "worst", "noise_clean", "noise_worst", "masked")


def finalists(cells: Sequence[dict[str, Any]], sparsity: float) -> dict[str, list[dict[str, Any]]]:
    """Return the cells of the three rows of one network, by what the row is called.

    Raises ValueError if a row is missing or a cell of it has not finished.
    """
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault((cell["method"], cell["sparsity"]), []).append(cell)
    pruned = {method: row for (method, share), row in rows.items() if share == sparsity}
    if ("magnitude", 0.0) not in rows or "rsr" not in pruned:
        raise ValueError("a table needs the sparsity 0 of magnitude, and rsr")
    seeds = len(pruned["rsr"])
    rivals = {m: row for m, row in pruned.items() if m != "rsr" and len(row) == seeds}
    if not rivals:
        raise ValueError("a table needs another method with as many seeds as rsr")
    rival = max(rivals, key=lambda method: _mean(rivals[method], "worst") or 0.0)
    chosen = {"dense": rows["magnitude", 0.0], "rsr": pruned["rsr"], rival: rivals[rival]}
    for name, row in chosen.items():
        if any(cell["status"] != "finished" for cell in row):
            raise ValueError(f"a cell of {name} has not finished")
    return chosen


def merged(tables: Iterable[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the cells of all ``tables``; one that several have counts once."""
    names = ("model", "method", "sparsity", "seed")
    return list({tuple(c[n] for n in names): c for table in tables for c in table}.values())


def judge(cell: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Return a cell with its figures under AutoAttack, on the images that are asked for."""
    place = asked.folder / f"{cell['model']}-{cell['method']}-{cell['sparsity']}-{cell['seed']}"
    result = place / "result.json"
    if not result.exists():
        place.mkdir(parents=True, exist_ok=True)
        words = (
            Path(sys.executable).with_name("spark-submit"), JOBS / "evaluate.py",
            *("--spark.master", asked.master, "--model", cell["network"]),
            *("--shards", asked.shards, "--attacks", ATTACKS, "--eps", EPS),
            *("--images", asked.images, "--sanity_images", asked.probes),
            *("--folder", place / "evaluations", "--output", result),
            *("--track.uri", f"sqlite:///{place.resolve()}/mlflow.db"),
        )  # fmt: skip
        subprocess.run([str(word) for word in words], check=True)
    found = json.loads(result.read_text(encoding="utf-8"))
    noise = None if found.get("noise") is None else NoiseResult.model_validate(found["noise"])
    return {
        **{name: cell[name] for name in ("model", "method", "sparsity", "seed", "zeros")},
        "images": found["images"],
        "clean": found["clean"]["accuracy"],
        "autoattack": next(a["accuracy"] for a in found["attacks"] if a["name"] == "autoattack"),
        "worst": found["worst_case"][0]["accuracy"],
        "noise_clean": noise and noise.clean,
        "noise_worst": noise and noise.worst,
        "masked": noise and noise.masked,
        "flags": [flag["sentence"] for flag in found["flags"] if flag["triggered"]],
    }


def table(rows: Iterable[tuple[str, str, Sequence[dict[str, Any]]]]) -> str:
    """Return ``rows`` of (network, name, cells) as Markdown: means, from lowest to highest."""
    lines = [f"| network | row | {' | '.join(FIGURES)} | flags |", "| --- |" * 2 + " --- |" * 7]
    for model, name, cells in rows:
        shown = " | ".join(_text(cells, figure) for figure in FIGURES)
        flagged = sum(bool(cell["flags"]) for cell in cells)
        lines.append(f"| {model} | {name} | {shown} | {flagged} |")
    return "\n".join(lines)


def _mean(cells: Sequence[dict[str, Any]], figure: str) -> float | None:
    values = [cell[figure] for cell in cells if cell[figure] is not None]
    return statistics.fmean(values) if values else None


def _text(cells: Sequence[dict[str, Any]], figure: str) -> str:
    mean = _mean(cells, figure)
    if mean is None:
        return "–"
    values = [cell[figure] for cell in cells if cell[figure] is not None]
    return f"{100 * mean:.1f} ({100 * min(values):.1f}–{100 * max(values):.1f})"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", required=True, help="results of prune_table, by commas")
    parser.add_argument("--shards", type=Path, required=True, help="shards of the tables")
    parser.add_argument("--sparsity", type=float, default=0.85, help="of the rows (default .85)")
    parser.add_argument("--images", type=int, default=300, help="test images (default 300)")
    parser.add_argument("--probes", type=int, default=64, help="of them for probes, noise (64)")
    parser.add_argument("--master", default="local[1]", help="Spark's master")
    parser.add_argument("--folder", type=Path, default=Path("build/pruned"), help="of evaluations")
    parser.add_argument("--figure", type=Path, help="also draw all cells over their sparsity (PNG)")
    parser.add_argument("--output", type=Path, default=Path("build/pruned.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Judge what is missing; print the table and write it after each network."""
    asked = arguments(argv)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str, list[dict[str, Any]]]] = []
    cells = merged(
        json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        for path in asked.tables.split(",")
    )
    if asked.figure:
        prune_figure([PruneCell.model_validate(cell) for cell in cells]).savefig(
            asked.figure, dpi=110
        )
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = [cell for cell in cells if cell["model"] == model]
        for name, row in finalists(own, asked.sparsity).items():
            rows.append((model, name, [judge(cell, asked) for cell in row]))
            document = [
                {"network": m, "row": n, **{f: _mean(judged, f) for f in FIGURES}, "cells": judged}
                for m, n, judged in rows
            ]
            write_result(asked.output, {"rows": document, "tables": cells})
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
