"""Federated adversarial training beside central training, on chest X-rays and on malaria cells.

    python tests/claims/federated.py --xrays SHARDS --malaria SHARDS --weights FILE.safetensors

The X-rays are divided among ten clients with skewed labels (Dirichlet, alpha .5). Of the malaria
cells, every patient of the training split is a client. All methods start from the same file of
weights and make about as many passes over the training images, in batches of one size, against one
budget. A part of the clients trains in each round, so there are more rounds than passes. Central
training follows the defaults of jobs/train_at.py and keeps its best epoch on validation images.
Clients follow the defaults of jobs/federate.py, the server has momentum (FedAvgM, .5), and a
federation keeps its last round. All work is done in this process; Spark would give a federation the
same bits.

Every (data, method, seed) that is done is a file in --folder; the same command does what is
missing, and an interrupted federation goes on with its last round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from medspark import ownership
from medspark.data.native import MappedSplit
from medspark.eps import with_eps
from medspark.evaluate.config import AttackSettings
from medspark.evaluate.robust import evaluate
from medspark.federate.config import FederationConfig
from medspark.federate.folder import FEDERATION_FILES, FederationFolder
from medspark.federate.network import new_network
from medspark.federate.server import InProcess, Server
from medspark.federate.setting import Setting
from medspark.federate.start import begin
from medspark.federate.stored import ClientRows
from medspark.federate.weights import unpack
from medspark.files import json_digest
from medspark.job import write_result
from medspark.memory import keep_freed_memory
from medspark.shards.manifest import read_manifest
from medspark.track.journal import Journal
from medspark.train.config import FitConfig
from medspark.train.learner import bf16_pays
from medspark.train.loop import fit
from medspark.train.run_folder import RUN_FILES
from medspark.train.validate import slices
from medspark.train.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))
EPS = 2 / 255

CLIENTS: dict[str, dict[str, Any]] = {
    "xrays": {"by": "dirichlet", "count": 10, "alpha": 0.5},
    "malaria": {"by": "patient"},
}
# SFAT favours one client of five, as in the paper (Zhu et al. 2023).
FAVOURED = 1 / 5
METHODS = ("fused_noise", "central", "sfat", "undefended", "calibrated", "calfat", "prox")


@dataclass(frozen=True)
class Setup:
    """What all cells have in common."""

    network: str
    weights: str | None
    passes: int
    images: int
    share: float = 0.5
    batch_size: int = FederationConfig().batch_size

    @property
    def model(self) -> dict[str, Any]:
        """The network and its first weights."""
        return {"name": self.network, "weights": self.weights}

    @property
    def rounds(self) -> int:
        """The rounds of a federation, in each of which a share of the clients trains."""
        return round(self.passes / self.share)

    def cohort(self, data: str, shards: Path) -> dict[str, Any]:
        """Return the clients of a dataset, and how many of them train in a round."""
        chosen = CLIENTS[data]
        count = chosen.get("count", read_manifest(shards).splits["train"].patients)
        return chosen | {"per_round": max(1, round(self.share * count))}

    @property
    def attacks(self) -> AttackSettings:
        """The attacks on the test images."""
        return AttackSettings(eps=(EPS,), images=self.images, sanity_images=100)


def federation(data: str, method: str, setup: Setup, seed: int, shards: Path) -> FederationConfig:
    """Return the configuration of a federation."""
    cohort = setup.cohort(data, shards)
    favoured = max(1, round(FAVOURED * cohort["per_round"]))
    own: dict[str, dict[str, Any]] = {
        "undefended": {"train": {"mode": "standard"}},
        "fused_noise": {"train": {"mode": "fused_noise"}},
        "prox": {"prox": 0.1, "train": {"mode": "fused_noise"}},
        "calibrated": {"calibrate": "loss", "train": {"mode": "fused_noise"}},
        "calfat": {"calibrate": "calfat", "train": {"inner_steps": 3}},
        "sfat": {"sfat": {"slack": 1 / 6, "enhanced": favoured}},
    }
    common = {
        "clients": cohort,
        "rounds": setup.rounds,
        "batch_size": setup.batch_size,
        "attack": {"eps": EPS},
        "aggregate": "fedavgm",
        "rule": {"momentum": 0.5},
        # As central training chooses.
        "precision": "bf16" if bf16_pays(ALONE.device) else "fp32",
        "model": setup.model,
        "seed": seed,
    }
    return FederationConfig.model_validate(common | own[method])


def federated(config: FederationConfig, setup: Setup, shards: Path, work: Path) -> dict[str, Any]:
    """Run the missing rounds of a federation in ``work``, and attack its network."""
    folder, manifest = FederationFolder(work), read_manifest(shards)
    begin(folder, config, shards, manifest)
    setting = Setting(config, shards, folder)
    clients = ClientRows(work / "clients.npz")
    server = Server(setting, InProcess(setting), clients)
    records = server.resume()
    for number in range(len(records), config.rounds):
        records.append(server.run(number))
        print(f"round {number + 1} of {config.rounds}: loss {records[-1].loss:.3f}", flush=True)
    model = new_network(config, manifest)
    unpack(model, folder.read(config.rounds - 1, "weights"), config.batch_norm)
    split = MappedSplit(shards, manifest, "test")
    rows = setup.attacks.rows(len(split))
    batches = slices(split, rows, batch_size=setup.attacks.batch_size, world=ALONE)
    below = setup.attacks.probed_below(rows)
    return {
        "clients": len(clients),
        "steps": sum(record.steps for record in records),
        "losses": [record.loss for record in records],
        **evaluate(model, batches, setup.attacks, probed_below=below).as_json(),
    }


def central(setup: Setup, seed: int, shards: Path, work: Path) -> FitConfig:
    """Return the configuration of training on the images of all clients together."""
    return FitConfig.model_validate({
        "shards": shards,
        "run_dir": work,
        "model": setup.model,
        "attack": {"eps": EPS},
        "train": {
            "epochs": setup.passes,
            "batch_size": setup.batch_size,
            "validation_images": 128,
            "validation_steps": 5,
            "monitor": {"action": "off"},
        },
        "evaluate": setup.attacks.model_dump(),
        "seed": seed,
    })  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One network to train and attack."""

    data: str
    method: str
    seed: int
    shards: Path
    setup: Setup

    @property
    def name(self) -> str:
        """A hash of all that decides the figures."""
        if self.method == "central":
            deciding = central(self.setup, self.seed, self.shards, Path()).deciding_weights()
        else:
            deciding = federation(
                self.data, self.method, self.setup, self.seed, self.shards
            ).deciding_weights()
        attacks = self.setup.attacks.model_dump(mode="json")
        return json_digest([deciding, attacks, read_manifest(self.shards).digest])[:16]

    def do(self, work: Path) -> dict[str, Any]:
        """Train and attack the network; ``work`` has the files meanwhile."""
        began = time.perf_counter()
        if self.method == "central":
            config = central(self.setup, self.seed, self.shards, work)
            found = {"clients": 0, "losses": [], **fit(config, ALONE, Journal(None))}
        else:
            chosen = federation(self.data, self.method, self.setup, self.seed, self.shards)
            found = federated(chosen, self.setup, self.shards, work)
        ownership.remove(work, (*RUN_FILES, *FEDERATION_FILES))
        cell = {"data": self.data, "method": self.method, "seed": self.seed}
        kept = ("clients", "steps", "losses", "images", "clean", "attacks", "worst_case", "flags")
        seconds = time.perf_counter() - began
        return cell | {"seconds": seconds} | {key: found[key] for key in kept}


def figures(cell: Mapping[str, Any]) -> dict[str, float]:
    """Return what the table shows of one cell, by column."""
    pgd = next(attack for attack in cell["attacks"] if attack["name"] == "pgd")
    return {
        "steps": cell["steps"],
        "clean AUROC": cell["clean"]["auroc"],
        "clean accuracy": cell["clean"]["accuracy"],
        "worst case AUROC": cell["worst_case"][0]["auroc"],
        "worst case accuracy": cell["worst_case"][0]["accuracy"],
        f"PGD-{pgd['steps']} accuracy": pgd["accuracy"],
    }


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean and the extremes over the seeds as Markdown, one method a line."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["data"], cell["method"]), []).append(cell)
    titles = list(figures(cells[0]))
    lines = [
        "| data | method | seeds | flagged | " + " | ".join(titles) + " |",
        "| --- | --- |" + " ---: |" * (len(titles) + 2),
    ]
    for (data, method), found in groups.items():
        flagged = sum(any(flag["triggered"] for flag in cell["flags"]) for cell in found)
        shown = [_spread([figures(cell)[title] for cell in found]) for title in titles]
        lines.append(
            f"| {data} | {method} | {len(found)} | {flagged} | " + " | ".join(shown) + " |"
        )
    sentences = [
        f"⚠ {cell['data']}, {cell['method']}, seed {cell['seed']}: {flag['sentence']}"
        for cell in cells
        for flag in cell["flags"]
        if flag["triggered"]
    ]
    return "\n".join([*lines, "", *sentences])


def figure(cells: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel per dataset: clean and worst-case AUROC of every seed, a colour per method.

    Hollow: a check says not to trust the network.
    """
    names = list(dict.fromkeys(cell["data"] for cell in cells))
    drawn = Figure(figsize=(1.6 + 3.4 * len(names), 3.6), layout="constrained")
    panels = drawn.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for cell in (cell for cell in cells if cell["data"] == name):
            seen, colour = figures(cell), f"C{METHODS.index(cell['method'])}"
            flagged = any(flag["triggered"] for flag in cell["flags"])
            place = [100 * seen["clean AUROC"]], [100 * seen["worst case AUROC"]]
            axes.plot(*place, "o", color=colour, markerfacecolor="none" if flagged else colour)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("clean AUROC, %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("worst-case AUROC, %")
    for number, method in enumerate(METHODS):
        panels[0].plot([], [], "o", color=f"C{number}", label=method)
    drawn.legend(loc="outside right center", fontsize=8)
    return drawn


def _spread(values: Sequence[float]) -> str:
    digits = 3 if max(values) <= 1 else 0
    mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} [{low}, {high}]"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--xrays", type=Path, help="shards of the chest X-rays; default: left out")
    parser.add_argument("--malaria", type=Path, help="shards of the cells; default: left out")
    parser.add_argument("--network", default="mobilenetv2_100", help="timm model name")
    parser.add_argument("--weights", help="first weights: a .safetensors file; random by default")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--passes", type=int, default=6, help="over all training images")
    parser.add_argument("--share", type=float, default=0.5, help="of the clients in each round")
    parser.add_argument("--images", type=int, default=200, help="test images that are attacked")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/federated"), help="of cells")
    parser.add_argument("--output", type=Path, default=Path("build/federated.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Do the cells that are missing, and print and write the table after each."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    weights = args.weights and str(Path(args.weights).resolve())
    setup = Setup(args.network, weights, args.passes, args.images, args.share)
    given = {"xrays": args.xrays, "malaria": args.malaria}
    shards = {name: path.resolve() for name, path in given.items() if path is not None}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        for method in args.methods.split(","):
            for data, path in shards.items():
                cell = Cell(data, method, seed, path, setup)
                kept = args.folder / f"{cell.name}.json"
                if not kept.exists():
                    print(f"{data}, {method}, seed {seed}", flush=True)
                    write_result(kept, cell.do(args.folder / cell.name))
                cells.append(with_eps(json.loads(kept.read_text(encoding="utf-8"))))
                write_result(args.output, {"setup": asdict(setup), "cells": cells})
                figure(cells).savefig(args.output.with_suffix(".png"), dpi=100)
                print(table(cells), flush=True)


if __name__ == "__main__":
    main()
