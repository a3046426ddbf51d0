"""The README's picture: accuracy over eps, and one radiograph with what two networks answer.

Reads   what `make demo` left: the shards, the undefended and the defended network
Writes  demo.json (a record) and demo.npz (the radiograph) for `measure`; demo.png for `draw`

    python tests/claims/picture.py measure --run build/demo/result.run --shards SHARDS
    python tests/claims/picture.py draw                     as `make readme` does
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from records import FOLDER, ROOT, Record

RECORD, PIXELS, PICTURE = FOLDER / "demo.json", FOLDER / "demo.npz", FOLDER / "demo.png"

_NETWORKS = {"undefended": "plain/model", "defended": "model"}
_LEVELS = (0, 0.5, 1, 2, 3, 4, 6, 8)  # eps in 255ths
_SHOWN = 4  # eps of the radiograph, in 255ths
_IMAGES = 200


def sources() -> str:
    """Return the digest of what the picture is drawn from; the picture carries it."""
    return hashlib.sha256(RECORD.read_bytes() + PIXELS.read_bytes()).hexdigest()


def drawn_from() -> str:
    """Return the digest of what the picture beside this file was drawn from."""
    with Image.open(PICTURE) as image:
        return str(image.info.get("sources", ""))


def measure(run: Path, shards: Path) -> None:
    """Attack both networks of the demo and write the record and the radiograph."""
    from medspark.data.config import DataConfig
    from medspark.data.source import open_source
    from medspark.models.card import read_card
    from medspark.models.checkpoint import load_classifier

    split = open_source(shards, DataConfig()).split("test")
    images, labels = split.tensors(np.arange(min(_IMAGES, len(split))))
    networks = {name: load_classifier(run / place) for name, place in _NETWORKS.items()}
    curves = {name: _curve(network, images, labels) for name, network in networks.items()}
    classes = read_card(run / "model").classes
    np.savez_compressed(PIXELS, **_radiograph(networks, images, labels, classes))
    RECORD.write_text(
        json.dumps(_record(curves, len(images)), indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def _curve(network: Any, images: Any, labels: Any) -> list[float]:
    """Return the worst case accuracy at every level, over PGD on both losses."""
    import torch

    from medspark.evaluate.config import AttackSettings
    from medspark.evaluate.robust import evaluate

    eps = tuple(level / 255 for level in _LEVELS[1:])
    config = AttackSettings(attacks=("pgd", "pgd_margin"), eps=eps, sanity_images=0)
    result = evaluate(network, [(images, labels, torch.arange(len(images)))], config)
    worst = sorted(result.worst_case, key=lambda attack: attack.eps)
    return [result.clean.accuracy, *(attack.accuracy for attack in worst)]


def _radiograph(networks: dict[str, Any], images: Any, truth: Any, classes: Sequence[str]) -> Any:
    """Return one image (H, W), what attacks on both networks make of it, and all answers."""
    import torch

    from medspark.attacks.pgd import pgd
    from medspark.attacks.threat import ThreatModel

    threat = ThreatModel(eps=_SHOWN / 255)
    attacked = {
        name: pgd(network, images, truth, threat=threat, steps=20)
        for name, network in networks.items()
    }
    with torch.no_grad():
        clean = {name: network(images).softmax(1) for name, network in networks.items()}
        under = {name: network(attacked[name]).softmax(1) for name, network in networks.items()}
    right = torch.stack([answer.argmax(1) == truth for answer in clean.values()]).all(0)
    fooled = under["undefended"].argmax(1) != truth
    held = under["defended"].argmax(1) == truth
    # Of the images that show the difference, the one that the defended network is surest of.
    row = int((right & fooled & held).float().mul(under["defended"].amax(1)).argmax())
    shown: dict[str, Any] = {"clean": _grey(images[row, 0]), "truth": classes[int(truth[row])]}
    for name in networks:
        shown[f"{name}_attacked"] = _grey(attacked[name][row, 0])
        for moment, answers in (("clean", clean), ("attacked", under)):
            answer = answers[name][row]
            shown[f"{name}_{moment}_answer"] = classes[int(answer.argmax())]
            shown[f"{name}_{moment}_probability"] = float(answer.max())
    return shown


def _grey(pixels: Any) -> Any:
    """Return an image (H, W) in [0, 1] as grey levels of 255."""
    return (pixels * 255).round().byte().numpy()


def _record(curves: dict[str, list[float]], images: int) -> dict[str, Any]:
    figures = {
        f"{name}_{level:g}".replace(".", "_"): {
            "value": round(100 * value, 1), "form": "percent", "digits": 1
        }
        for name, values in curves.items()
        for level, value in zip(_LEVELS, values, strict=True)
    }  # fmt: skip
    head = "| network | " + " | ".join(f"{level:g}/255" for level in _LEVELS) + " |"
    rows = [
        f"| {name} | "
        + " | ".join(f"{{{name}_{level:g}}}".replace(".", "_") for level in _LEVELS)
        + " |"
        for name in curves
    ]
    git = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "what": f"Accuracy over eps of the demo's two networks on {images} test images.",
        "commands": [
            "make demo",
            "python tests/claims/picture.py measure --run build/demo/result.run "
            "--shards build/demo/1200-images-64px-seed-0/shards",
        ],
        "commit": git.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "hardware": "2 shared cores, no accelerator",
        "seeds": [0],
        "figures": figures,
        "text": [
            f"Accuracy on {images} test images of the demo's phantom over eps, the worst case per "
            "image of PGD with 20 steps on",
            "the cross-entropy and on the margin (ResNet10-t from random weights, six epochs, "
            "trained against 4/255):",
            "",
            head,
            "| --- " * (len(_LEVELS) + 1) + "|",
            *rows,
        ],
    }  # fmt: skip


def draw() -> None:
    """Draw the picture from the record and the radiograph."""
    from matplotlib.figure import Figure

    record = Record.model_validate_json(RECORD.read_bytes())
    shown = np.load(PIXELS)
    figure = Figure(figsize=(9.6, 3.1), dpi=120, layout="constrained")
    grid = figure.add_gridspec(1, 4, width_ratios=(1.7, 1, 1, 1))
    _draw_curves(figure.add_subplot(grid[0]), record)
    panels = [
        ("radiograph", shown["clean"], "undefended_clean", "defended_clean"),
        (f"attacked, {_SHOWN}/255", shown["undefended_attacked"], "undefended_attacked", None),
        (f"attacked, {_SHOWN}/255", shown["defended_attacked"], None, "defended_attacked"),
    ]
    for place, (title, pixels, *asked) in enumerate(panels, 1):
        axes = figure.add_subplot(grid[place])
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=9)
        answers = [_answer(shown, name) for name in asked if name]
        axes.set_xlabel("\n".join(answers), fontsize=8)
        axes.set(xticks=[], yticks=[])
    figure.savefig(PICTURE, metadata={"sources": sources()})


def _draw_curves(axes: Any, record: Record) -> None:
    for name, color in (("undefended", "tab:red"), ("defended", "tab:blue")):
        values = [record.figures[f"{name}_{x:g}".replace(".", "_")].value for x in _LEVELS]
        axes.plot(_LEVELS, values, marker="o", ms=3.5, color=color, label=name)
    axes.set(xlabel="eps, 255ths", ylabel="accuracy, %", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")


def _answer(shown: Any, name: str) -> str:
    network = name.partition("_")[0]
    answer, sure = shown[f"{name}_answer"], float(shown[f"{name}_probability"])
    right = "✓" if str(answer) == str(shown["truth"]) else "✗"
    return f"{network}: {answer} {100 * sure:.0f} % {right}"


def main(argv: Sequence[str]) -> int:
    """Do what ``argv`` asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "draw"))
    parser.add_argument("--run", type=Path, default=ROOT / "build/demo/result.run")
    parser.add_argument("--shards", type=Path)
    options = parser.parse_args(argv)
    if options.what == "measure":
        measure(options.run, options.shards)
    if options.what == "measure" or drawn_from() != sources():
        draw()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
