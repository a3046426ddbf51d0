"""Guards of plain and of robust networks, and attacks through them, on three sets of images.

    python tests/claims/guards.py --xrays SHARDS --malaria SHARDS --six SHARDS --weights FILE
    python tests/claims/guards.py --from_folder tests/claims/guards_cells --record guards.json

A cell is a set, a network, a training and a seed. jobs/train_at.py trains its network (MobileNet-V2
from the file of weights, DenseNet121 from random weights), jobs/detect.py fits detectors on it and
attacks through them, and with --denoise jobs/denoise.py puts a denoiser before it, through which
the same attacks go. Every cell that is done is one small JSON file in --cells; what is done is not
done again, and an interrupted job goes on. --from_folder runs nothing: it makes the tables, and
with --record the record, of the cells that are there, and says which are missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from guards_figures import NETWORKS, SETS, TRAININGS, name_of, trimmed
from guards_tables import DENOISER, record, tables

from medspark.evaluate.config import AttackSettings
from medspark.files import json_digest, sha256_of
from medspark.job import write_result
from medspark.models.card import WEIGHTS
from medspark.shards.manifest import read_manifest
from medspark.shards.schema import read_patients

ROOT = Path(__file__).resolve().parents[2]
FROM_WEIGHTS = "mobilenetv2_100"
DETECTORS = "kde,bu,lid,safetynet,mahalanobis,deep,smoothed"
# "cw" is the nearest image in L2, cut to the budget; "pgd_margin" descends on C&W's loss within it.
ATTACKS = "fgsm,pgd,pgd_margin,cw"
LEARNT_ATTACKS = "fgsm,pgd,deepfool,cw"
OF_DENOISED = "fgsm,pgd,pgd_margin"
# A robust network is hardly fooled at 2/255, so its detectors learn from larger budgets, too.
EPS = {"plain": "2/255", "robust": "2/255,4/255"}
LEARNT = {"plain": "2/255", "robust": "2/255,4/255,8/255"}


@dataclass(frozen=True)
class Setup:
    """What all cells have in common, and what decides their figures."""

    epochs: int
    images: int
    steps: int
    adaptive_steps: int
    searches: int
    reference: int
    contrast: int
    validation: int
    choosing: int
    detectors: str
    learnt: str
    attacks: str = ATTACKS


@dataclass(frozen=True)
class Cell:
    """One network to train, to guard and to attack."""

    data: str
    network: str
    training: str
    seed: int
    shards: Path
    weights: Path | None
    setup: Setup
    master: str

    @property
    def name(self) -> str:
        """The name of the cell's file."""
        return name_of(self.data, self.network, self.training, self.seed)

    def decisive(self) -> dict[str, Any]:
        """Return the settings that a kept cell has to have."""
        weights = self.weights and sha256_of(
            self.weights / WEIGHTS if self.weights.is_dir() else self.weights
        )
        shards = read_manifest(self.shards).digest
        return {**asdict(self.setup), "shards": shards, "weights": weights}

    @property
    def folder(self) -> str:
        """The name of the folder of the running jobs: other settings have another one."""
        return f"{self.name}-{json_digest(self.decisive())[:8]}"

    def do(self, place: Path, *, denoise: bool) -> dict[str, Any]:
        """Run the jobs that are missing in ``place``; return the small document of the cell."""
        began, whole = time.perf_counter(), not place.exists()
        place.mkdir(parents=True, exist_ok=True)
        trained = self._trained(place)
        found = {
            "detect": self._guarded(place, "detect", place / "run/model", self.setup.detectors)
        }
        if denoise:
            model = self._denoised(place)
            found["denoise"] = self._guarded(place, "denoise", model, DENOISER)
        minutes = (time.perf_counter() - began) / 60
        return {
            "data": self.data, "network": self.network, "training": self.training,
            "seed": self.seed, "setup": self.decisive(), "commit": _commit(),
            "patients": self._patients(), "minutes": minutes if whole else None,
            "clean": trained["clean"],
            **{name: trimmed(result) for name, result in found.items()},
        }  # fmt: skip

    def _trained(self, place: Path) -> dict[str, Any]:
        mode = ("--train.mode", "standard") if self.training == "plain" else ()
        weights = ("--model.weights", self.weights) if self.weights else ()
        return self._job(
            "train_at", place, "training",
            *("--model.name", self.network, *weights, *mode, "--attack.eps", "2/255"),
            *("--train.epochs", self.setup.epochs, "--train.validation_images", 128),
            *("--train.validation_steps", 5, "--launch.processes", 1, "--launch.ddp", "false"),
            *("--evaluate.images", self.setup.images, "--evaluate.sanity_images", 0),
            *("--run_dir", place / "run", "--resume", "auto"),
        )  # fmt: skip

    def _denoised(self, place: Path) -> Path:
        self._job(
            "denoise", place, "denoiser",
            *("--model", place / "run/model", "--attack.eps", "2/255"),
            *("--train.epochs", self.setup.epochs, "--train.validation_images", 64),
            *("--train.validation_steps", 5, "--launch.processes", 1, "--launch.ddp", "false"),
            *("--evaluate.images", 20, "--evaluate.sanity_images", 0, "--evaluate.steps", 2),
            *("--judge.images", 20, "--judge.adaptive.attacks", "selective"),
            *("--judge.adaptive.steps", 2),
            *("--run_dir", place / "denoiser.run", "--resume", "auto"),
        )  # fmt: skip
        return place / "denoiser.run/model"

    def _guarded(self, place: Path, name: str, model: Path, detectors: str) -> dict[str, Any]:
        chosen, eps = self.setup, EPS[self.training]
        layers = ("--layers", "contrast") if detectors == DENOISER else ()
        attacks, learnt = chosen.attacks, chosen.learnt
        if detectors == DENOISER:  # C&W's 600 passes are dear through it
            attacks, learnt = OF_DENOISED, "fgsm,pgd"
        return self._job(
            "detect", place, name,
            *("--model", model, "--detectors", detectors, *layers, "--eps", eps),
            *("--attacks", attacks, "--steps", chosen.steps, "--images", chosen.images),
            *("--fit.attacks", learnt, "--fit.eps", LEARNT[self.training]),
            *("--fit.reference_images", chosen.reference),
            *("--fit.contrast_images", chosen.contrast),
            *("--fit.validation_images", chosen.validation),
            *("--fit.choosing_images", chosen.choosing),
            *("--adaptive.steps", chosen.adaptive_steps, "--adaptive.searches", chosen.searches),
            *("--folder", place / f"{name}ions", "--guard_folder", place / f"{name}-guard"),
        )  # fmt: skip

    def _job(self, job: str, place: Path, name: str, *words: object) -> dict[str, Any]:
        """Run a job unless its result is there. Raises CalledProcessError if it fails."""
        result = place / f"{name}.json"
        if not result.exists():
            submit = Path(sys.executable).with_name("spark-submit")
            command = [
                submit, ROOT / "jobs" / f"{job}.py", "--spark.master", self.master,
                *("--shards", self.shards, "--seed", self.seed, *words, "--output", result),
                *("--track.uri", f"sqlite:///{place}/mlflow.db", "--track.log_model", "false"),
                *("--track.system_metrics", "false"),
            ]  # fmt: skip
            subprocess.run([str(word) for word in command], check=True)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found

    def _patients(self) -> int:
        """Return how many patients the attacked test images are of."""
        test = read_manifest(self.shards).splits["test"]
        drawn = AttackSettings(images=self.setup.images, seed=self.seed).rows(test.rows)
        patients = np.concatenate([read_patients(self.shards / each.path) for each in test.shards])
        return len(np.unique(patients[drawn]))


def _commit() -> str:
    words = ["git", "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(
        words, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Return the cells that are done, in the order of the tables."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json"))
    orders = {"data": SETS, "network": NETWORKS, "training": TRAININGS}

    def place(cell: dict[str, Any]) -> tuple[int, ...]:
        known = [[*order, cell[key]].index(cell[key]) for key, order in orders.items()]
        return (*known, cell["seed"])

    return sorted(found, key=place)


def wanted(asked: argparse.Namespace) -> list[Cell]:
    """Return the cells that the command line names, the most telling ones first."""
    given = {name: getattr(asked, name) for name in SETS}
    networks, trainings = asked.networks.split(","), asked.trainings.split(",")
    setup = Setup(
        asked.epochs, asked.images, asked.steps, asked.adaptive_steps, asked.searches,
        asked.reference, asked.contrast, asked.validation, asked.choosing, asked.detectors,
        asked.learnt,
    )  # fmt: skip
    cells = [
        Cell(data, network, training, seed, shards.resolve(),
             asked.weights.resolve() if asked.weights and network == FROM_WEIGHTS else None,
             setup, asked.master)
        for seed in map(int, asked.seeds.split(","))
        for network in networks
        for data, shards in given.items() if shards is not None
        for training in trainings
    ]  # fmt: skip
    return [cell for cell in cells if asked.only in cell.name]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, title in SETS.items():
        parser.add_argument(f"--{name}", type=Path, help=f"shards of {title}; default: left out")
    parser.add_argument(
        "--weights", type=Path, help=f"first weights of {FROM_WEIGHTS}: a file or a model folder"
    )
    parser.add_argument("--networks", default=",".join(NETWORKS), help="separated by commas")
    parser.add_argument("--trainings", default=",".join(TRAININGS), help="separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--only", default="", help="a part of the names of the cells to run")
    parser.add_argument("--denoise", action="store_true", help="also with a denoiser")
    parser.add_argument("--detectors", default=DETECTORS, help="separated by commas")
    parser.add_argument(
        "--learnt", default=LEARNT_ATTACKS, help="attacks that detectors learn, separated by commas"
    )
    parser.add_argument("--epochs", type=int, default=4, help="of each training")
    parser.add_argument("--images", type=int, default=32, help="test images that are attacked")
    parser.add_argument("--steps", type=int, default=20, help="of oblivious attacks")
    parser.add_argument("--adaptive_steps", type=int, default=40, help="of attacks on the guard")
    parser.add_argument("--searches", type=int, default=3, help="weights of the weighted attack")
    parser.add_argument("--reference", type=int, default=300, help="clean training images")
    parser.add_argument("--contrast", type=int, default=500, help="attacked training images")
    parser.add_argument("--validation", type=int, default=400, help="validation images")
    parser.add_argument("--choosing", type=int, default=80, help="of them, that are attacked")
    parser.add_argument("--master", default="local[1]", help="Spark's master")
    parser.add_argument("--work", type=Path, default=Path("build/guards"), help="of running jobs")
    parser.add_argument(
        "--cells", type=Path, default=Path("tests/claims/guards_cells"), help="that are done"
    )
    parser.add_argument("--from_folder", type=Path, help="make tables of the cells in it, run none")
    parser.add_argument("--record", type=Path, help="write the record of the cells to this file")
    parser.add_argument("--hardware", default="", help="of the cells, for the record")
    parser.add_argument("--output", type=Path, default=Path("build/guards.json"), help="figures")
    asked = parser.parse_args(argv)
    if asked.record and not asked.hardware:
        parser.error("--record: say on which --hardware the cells were measured")
    if asked.from_folder and not any(asked.from_folder.glob("*.json")):
        parser.error(f"--from_folder: there is no cell in {asked.from_folder}")
    if not asked.from_folder:
        if not any(getattr(asked, name) for name in SETS):
            parser.error(f"give the shards of a set: {', '.join(f'--{name}' for name in SETS)}")
        if not wanted(asked):
            parser.error(f"--only: no cell has '{asked.only}' in its name")
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, and print and write the tables after each."""
    asked = arguments(argv)
    for cell in [] if asked.from_folder else wanted(asked):
        kept = asked.cells / f"{cell.name}.json"
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        whole = "detect" in before and ("denoise" in before or not asked.denoise)
        if not whole or before["setup"] != cell.decisive():
            print(f"{cell.name} …", flush=True)
            document = cell.do((asked.work / cell.folder).resolve(), denoise=asked.denoise)
            asked.cells.mkdir(parents=True, exist_ok=True)
            write_result(kept, document)
        _show(read_cells(asked.cells), asked)
    if asked.from_folder:
        _show(read_cells(asked.from_folder), asked)


def _show(cells: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    found = record(cells, asked.hardware)
    print(tables(cells), flush=True)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    figures = [{"name": key, **figure} for key, figure in found["figures"].items()]
    write_result(asked.output, {"figures": figures})
    if asked.record:
        write_result(asked.record, found)


if __name__ == "__main__":
    main()
