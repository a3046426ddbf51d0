"""The measurement of guards: what a cell keeps, what the tables say, and what is still missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bright_halves
import guards
import guards_figures
import numpy as np
import pytest
from guards_figures import Detection, Measured, pooled
from guards_tables import record, tables
from measure import is_within, look_up
from records import Record

from medspark.seeding import uniform


def figures(name: str, attack: str, eps: float, auroc: float, missed: float) -> dict[str, Any]:
    """Return a line of a result document of jobs/detect.py."""
    worst = {
        "auroc": 0.25, "tpr_at_fpr": {"0.05": 0.5}, "undetected_and_wrong": 0.4,
        "accuracy_with_guard": 0.3, "attacks": ["fgsm", "pgd", "cw"], "direct": name != "bu",
    }  # fmt: skip
    adaptive = {"reason": "elsewhere", "upper_bound": worst} if name == "safetynet" else worst
    return {
        "name": name, "layer": "penultimate", "attack": attack, "eps": eps, "fooled": 16,
        "auroc": auroc, "tpr_at_fpr": {"0.05": 0.5}, "undetected_and_wrong": missed,
        "adaptive": adaptive,
    }  # fmt: skip


def result(fgsm: float, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a result document of jobs/detect.py, of 20 images."""
    return {
        "images": 20, "accuracy": 0.9, "surrogates": {}, "report": "r", "model": "m",
        "chosen": {"name": "kde", "layer": "penultimate", "auroc": 0.99, "best_single": "kde"},
        "undetected_without_guard": {"2/255": 0.8, "4/255": 0.9},
        "false_positives": {"asked": 0.05, "rate": 0.1, "interval": [0, 0.2], "images": 20,
                            "classes": {}, "sites": {}},
        "detectors": [
            figures(name, attack, eps / 255, area, 0.1 * eps)
            for name in ("kde", "safetynet", "bu")
            for eps in (2, 4)
            for attack, area in (("fgsm", fgsm), ("pgd", 0.99), ("cw", 1.0))
        ],
        "flags": [
            {"name": f"{name}: no_better", "triggered": name in flags, "sentence": f"{name} fails"}
            for name in ("kde:penultimate", "safetynet:penultimate")
        ],
    }  # fmt: skip


def cell(training: str = "plain", seed: int = 0, fgsm: float = 0.98, **more: Any) -> dict[str, Any]:
    return {
        "data": "xrays", "network": "mobilenetv2_100", "training": training, "seed": seed,
        "setup": {"epochs": 4, "reference": 300, "contrast": 200, "choosing": 80, "images": 20,
                  "steps": 20, "adaptive_steps": 40, "searches": 3, "learnt": "fgsm,pgd"},
        "commit": "0123abc", "patients": 18, "minutes": 5.5,
        "detect": guards_figures.trimmed(result(fgsm, **more)),
    }  # fmt: skip


def with_margin(found: dict[str, Any]) -> dict[str, Any]:
    """Return the cell with margin PGD among its attacks, which does what PGD does."""
    lines = found["detect"]["detectors"]
    margin = [{**each, "attack": "pgd_margin"} for each in lines if each["attack"] == "pgd"]
    return found | {"detect": found["detect"] | {"detectors": [*lines, *margin]}}


def test_a_cell_is_small_and_keeps_a_figure_beside_its_adaptive_one():
    kept = guards_figures.trimmed(result(0.98765432, flags=("kde:penultimate",)))

    line = kept["detectors"][0]
    assert (line["eps"], line["auroc"], line["adaptive"]["auroc"]) == ("2/255", 0.9877, 0.25)
    assert [each["adaptive"]["bound"] for each in kept["detectors"][::6]] == [False, True, False]
    assert [flag["name"] for flag in kept["flags"]] == ["kde:penultimate: no_better"]
    assert not {"report", "model"} & set(kept)


def test_figures_are_read_at_their_budget_and_count_patients_or_fooled_images():
    found, key = cell(), ("kde", "penultimate")

    assert Detection(found, "2/255").oblivious(key, "fgsm") == Measured(0.98, 16)
    assert Detection(found, "4/255").undetected(key, adaptive=False) == Measured(0.4, 18)
    assert Detection(found, "2/255").undetected(key, adaptive=True) == Measured(0.4, 18)
    # .8 of 20 images are wrong under attack, and .1 are so already when clean.
    assert Detection(found, "2/255").adaptive(key) == Measured(0.25, 14)
    assert Detection(found, "2/255").alone() == Measured(0.8, 18)
    assert Detection(found, "2/255").layer_of("bu") is None


def test_seeds_are_pooled_with_an_interval_that_more_images_narrow():
    one = pooled([Measured(0.9, 20)])
    both = pooled([Measured(0.9, 20), None, Measured(0.8, 20, bound=True, flagged=True)])

    assert one is not None
    assert both is not None
    assert (both.value, both.bound, both.flagged) == (pytest.approx(0.85), True, True)
    assert both.high - both.low < one.high - one.low
    assert pooled([Measured(1.0, 20)]).low < 1  # type: ignore[union-attr]
    assert pooled([None]) is None


def test_the_goal_needs_every_attack():
    assert guards_figures.reaches_goal(with_margin(cell(fgsm=0.98)))
    assert not guards_figures.reaches_goal(with_margin(cell(fgsm=0.97)))
    assert not guards_figures.reaches_goal(cell(fgsm=0.98))  # margin PGD was not tried


def test_what_a_guard_saves_counts_beyond_refusing_by_chance():
    many, few = cell("robust"), cell("robust")
    few["detect"]["undetected_without_guard"]["2/255"] = 0.45

    found = [guards_figures.saves([each], "2/255") for each in (many, few)]
    bound = cell("robust")
    bound["detect"]["chosen"]["name"] = "safetynet"

    assert [share.value for share, _ in filter(None, found)] == pytest.approx([0.4, 0.05])
    assert [s.low > chance for s, chance in filter(None, found)] == [True, False]
    # The guard refuses .1 of clean images, which is more than the .05 that were asked.
    assert [chance for _, chance in filter(None, found)] == pytest.approx([0.08, 0.045])
    assert guards_figures.saves([bound], "2/255") is None  # of which only a bound is known


def test_tables_mark_bounds_and_flags_and_name_the_missing_cells():
    denoised = cell("robust") | {"denoise": cell()["detect"]}
    for line in denoised["denoise"]["detectors"]:
        line["name"] = line["name"].replace("kde", "contrastive")

    shown = tables([with_margin(cell(flags=("kde:penultimate",))), denoised])

    assert "| chest X-rays | MobileNet-V2 | plain | 1 | kde | ⚠ .98 (" in shown
    assert "→ ≤ .25 (" in shown
    assert "≥ .40 (" in shown
    assert "| chest X-rays | MobileNet-V2 | 4/255 | .90 (" in shown
    assert "1 of 1 cells reach it (xrays-mobilenetv2_100-plain-0)" in shown
    assert "⚠ xrays-mobilenetv2_100-plain-0: kde:penultimate fails." in shown
    assert "2/255: it saves .40 (.21–.62), by chance 0.080: it counts." in shown
    assert (
        "34 of the planned cells are not measured yet (seeds): xrays-mobilenetv2_100-plain (1, 2)"
        in shown
    )


def test_a_record_is_made_of_the_cells_that_are_there():
    found = Record.model_validate(record([cell(), cell(seed=1, fgsm=0.9)], "two cores"))

    key = "xrays_mobilenetv2_100_plain_fgsm"
    assert found.figures[key].value == pytest.approx(0.94)
    assert found.figures[key].path == f"figures[name={key}]value"
    assert found.seeds == (0, 1)
    assert "No plain network" not in found.render()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give the shards of a set"),
        (["--xrays", "shards", "--only", "nothing"], "no cell has 'nothing'"),
        (["--from_folder", "/nowhere"], "there is no cell in /nowhere"),
        (["--xrays", "shards", "--record", "r.json"], "say on which --hardware"),
    ],
)
def test_misuse_is_one_sentence(words, sentence: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        guards.arguments(words)

    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_other_settings_have_another_folder(write_shards: Callable[..., Path]):
    words = ["--xrays", str(write_shards(rows=40)), "--only", "densenet121-plain-0"]

    (one,), (same,), (other,) = (
        guards.wanted(guards.arguments([*words, *more])) for more in ([], [], ["--epochs", "9"])
    )

    assert one.name == other.name == "xrays-densenet121-plain-0"
    assert one.folder == same.folder != other.folder


@pytest.mark.slow
@pytest.mark.spark
def test_a_cell_is_made_by_the_jobs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bright_halves, "pictures", faint)
    monkeypatch.setattr(guards, "FROM_WEIGHTS", "test_resnet")
    shards = bright_halves.write_halves(tmp_path / "shards")
    network = bright_halves.save_network(tmp_path / "network")
    command = [
        *("--xrays", str(shards), "--networks", "test_resnet", "--weights", str(network)),
        *("--only", "plain-0", "--epochs", "1", "--images", "20", "--steps", "2"),
        *("--adaptive_steps", "2", "--searches", "1", "--reference", "60", "--contrast", "60"),
        *("--validation", "80", "--choosing", "30", "--detectors", "kde,lid", "--denoise"),
        *("--cells", str(tmp_path / "cells"), "--work", str(tmp_path / "work")),
        *("--output", str(tmp_path / "out.json"), "--record", str(tmp_path / "record.json")),
        *("--hardware", "two cores"),
    ]

    guards.main(command)
    monkeypatch.setattr(guards.Cell, "do", lambda *_: pytest.fail("done twice"))
    guards.main(command)

    (kept,) = (tmp_path / "cells").iterdir()
    assert kept.name == "xrays-test_resnet-plain-0.json"
    found = json.loads(kept.read_text())
    assert found["detect"]["images"] == found["denoise"]["images"] == found["patients"] == 20
    assert {line["name"] for line in found["detect"]["detectors"]} == {"kde", "lid", "combination"}
    assert {line["name"] for line in found["denoise"]["detectors"]} == {"contrastive"}
    record = Record.model_validate_json((tmp_path / "record.json").read_bytes())
    document = json.loads((tmp_path / "out.json").read_text())
    for figure in record.figures.values():
        assert is_within(look_up(document, figure.path), figure)
    assert "| chest X-rays | test_resnet | plain | 1 |" in capsys.readouterr().out


def faint(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images of which one half is brighter, so little that 2/255 turns some."""
    count, seed = {"train": (160, 0), "val": (80, 1), "test": (24, 2)}[split]
    labels = np.arange(count) % 2
    images = 80 + 60 * uniform(seed, np.arange(count * 256)).reshape(count, 16, 16, 1)
    images[labels == 1, :8] += 6
    images[labels == 0, 8:] += 6
    return images.astype(np.uint8), labels


def test_cells_of_an_earlier_setup_are_named():
    newer = cell(seed=1)
    newer["setup"] = {**newer["setup"], "attacks": "fgsm,pgd,pgd_margin,cw"}

    text = "\n".join(record([cell(), newer], "a laptop")["text"])

    assert "(–): xrays-mobilenetv2_100-plain-0." in text
    assert "(–)" not in "\n".join(record([newer], "a laptop")["text"]).partition("AUROC of the")[0]
