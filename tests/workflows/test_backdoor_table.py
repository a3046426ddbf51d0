"""The backdoor table: its cells, what decides them, and a small one filled from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import array_shards
import numpy as np
import pytest
from pydantic import ValidationError

from medspark.errors import UsageError
from medspark.federate.aggregate import RULES
from medspark.shards.manifest import read_manifest
from medspark.study.backdoor_report import BackdoorCell
from medspark.study.cells import held_study
from medspark.workflows import backdoor_table
from medspark.workflows.backdoor_plan import (
    BackdoorTableConfig,
    Federation,
    ablation,
    check,
    federation_of,
    fingerprint,
    screened,
    table,
    usable,
    warm_up,
)
from medspark.workflows.backdoor_table import Table

SMALL: dict[str, Any] = {
    "adversaries": ("badnets", "none"),
    "rules": ("fedavg", "krum"),
    "warm_up": 1,
    "rounds": 2,
    "later": 1,
    "averaged": 1,
    "clients": {"by": "dirichlet", "count": 6, "per_round": 5},
    "adversary": {"clients": (1, 4), "per_round": 1, "badnets": {"poisoned": 0.5}},
    "local": {
        "train": {"mode": "standard"},
        "batch_size": 4,
        "optimiser": "sgd",
        "lr": 0.05,
        "schedule": "constant",
    },
    "model": {"name": "test_efficientnet_gn"},
    "evaluate": {"attacks": ("pgd",), "eps": (2 / 255,), "steps": 1, "sanity_images": 0},
}


def write(folder: Path, *, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    draw = np.random.default_rng(0)
    parts = {name: (24 if name == "train" else 8) for name in splits}
    arrays = {
        name: (draw.integers(0, 256, (n, 32, 32, 1)).astype(np.uint8), np.arange(n) % 2)
        for name, n in parts.items()
    }
    return array_shards.write_arrays(folder, arrays)


def small(tmp_path: Path, **changes: Any) -> BackdoorTableConfig:
    shards = tmp_path / "shards"
    if not shards.exists():
        write(shards)
    track = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    own = {"shards": shards, "folder": tmp_path / "work", "track": track}
    return BackdoorTableConfig.model_validate(SMALL | own | changes)


def test_a_table_has_a_cell_for_every_adversary_and_rule_and_begins_without_an_attack():
    config = BackdoorTableConfig(adversaries=("badnets", "none", "ipm"), rules=("fedavg", "rfa"))

    found = [(one.adversary, one.rule) for one in table(config, 3)]

    assert found == [(a, r) for a in ("none", "badnets", "ipm") for r in ("fedavg", "rfa")]


def test_an_adversary_whose_updates_no_rule_sees_has_one_cell():
    config = BackdoorTableConfig(adversaries=("nan", "ipm"), rules=("rfa", "krum"))

    found = [(one.adversary, one.rule) for one in table(config, 0)]

    assert found == [("nan", "rfa"), ("ipm", "rfa"), ("ipm", "krum")]


def test_rules_that_cannot_work_are_left_out_with_the_reason(tmp_path: Path):
    write(tmp_path / "shards", splits=("train", "test"))
    rules = {"rules": ("bulyan", "rfa", "fltrust"), "ablation": {"rules": ("rfa", "bulyan")}}
    config = small(tmp_path, **rules)
    check(config)

    found, reasons = usable(config, read_manifest(tmp_path / "shards"))

    assert (found.rules, found.ablation.rules) == (("rfa",), ("rfa",))
    assert reasons["bulyan"].startswith("Bulyan needs at least 7 clients in a round")
    assert reasons["fltrust"].startswith("fltrust trains on validation images")


def test_other_seeds_are_run_for_rows_that_differ():
    first = [Federation("none", "fedavg", 0), Federation("ipm", "fedavg", 0)]

    found = screened(first, (1, 2), first[1:])

    assert [(one.adversary, one.seed) for one in found] == [
        *(("none", 0), ("ipm", 0), ("ipm", 1), ("ipm", 2))
    ]


def test_the_ablation_varies_the_share_of_honest_clients_with_tail_images():
    config = BackdoorTableConfig.model_validate(
        {"seeds": (0, 1), "adversary": {"edge": "phantom"},
         "ablation": {"shares": (0, 0.5), "adversaries": ["projected"], "rules": ["rfa"]}}
    )  # fmt: skip

    found = list(ablation(config))

    assert {one.honest_edge for one in found} == {0, 0.5}
    assert len(found) == 4
    assert federation_of(config, found[-1]).adversary.honest_edge == 0.5


def test_the_attack_of_a_cell_stops_before_its_last_rounds():
    chosen = federation_of(BackdoorTableConfig(rounds=4, later=3), Federation("ipm", "fedavg", 7))

    assert [round for round in range(chosen.rounds) if chosen.adversary.attacks_in(round)] == [
        *range(4)
    ]
    assert (chosen.rounds, chosen.seed) == (7, 7)


def test_the_warm_up_is_one_client_that_holds_all_images():
    chosen = warm_up(BackdoorTableConfig(warm_up=5), seed=3)

    assert (chosen.clients.count, chosen.clients.by, chosen.rounds) == (1, "patient", 5)
    assert chosen.adversary.name == "none"


@pytest.mark.parametrize("written", [{"krum": {"adversaries": 2}}, {"krum.adversaries": "2"}])
def test_a_rule_has_its_settings_from_yaml_or_from_dotted_keys(written: dict[str, Any]):
    config = BackdoorTableConfig(rule=written)

    found = federation_of(config, Federation("none", "krum", 0))

    assert found.rule_for(8) == RULES["krum"](adversaries=2)
    assert federation_of(config, Federation("none", "rfa", 0)).rule == {}


def test_settings_of_other_adversaries_and_rules_do_not_change_a_cell(tmp_path: Path):
    one, manifest = Federation("badnets", "krum", 0), read_manifest(write(tmp_path / "shards"))
    usual = fingerprint(BackdoorTableConfig(), one, manifest)

    def changed(**changes: Any) -> str:
        return fingerprint(BackdoorTableConfig.model_validate(changes), one, manifest)

    assert changed(adversary={"a3fl": {"steps": 9}}, rule={"rfa": {"smoothing": 0.1}}) == usual
    assert changed(adversary={"badnets": {"size": 2}}) != usual
    assert changed(rule={"krum": {"adversaries": 2}}) != usual
    assert changed(warm_up=3) != usual
    assert changed(later=3) != usual


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": ["krum", "nokrum"]}, "there is no rule nokrum"),
        ({"rule": {"nokrum": {}}}, "rule.nokrum: there is no such rule"),
        ({"rule": {"krum": {"adverse": 1}}}, "rule.krum.adverse"),
        ({"rules": ["krum"], "rule": {"krum": {"adversaries": 3}}}, "Krum needs at least 9"),
        ({"seeds": [1, 1]}, "names one of them twice"),
        ({"adversaries": ["edge_case"]}, "edge_case needs tail images"),
        ({"adversary": {"clients": [9]}}, "no client 9"),
        ({"ablation": {"shares": [2]}}, "shares are from 0 to 1"),
        ({"clients": {"per_round": 25}}, "per_round 25 is more than the 24 clients"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    changes: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(UsageError, match=message):
        check(small(tmp_path, **changes))


def test_what_the_table_sets_cell_by_cell_is_not_for_the_user():
    with pytest.raises(ValidationError, match=r"adversary.name is set by the table"):
        BackdoorTableConfig.model_validate({"adversary": {"name": "ipm"}})


@pytest.mark.slow
def test_a_small_table_is_filled_and_never_twice(tmp_path: Path, monkeypatch):
    config = small(tmp_path, rules=("fedavg", "krum", "bulyan"))
    check(config)

    with held_study(config.folder):
        done = Table(config, command="c", machine="m").fill()
        monkeypatch.delattr(backdoor_table, "run_federation")
        again = Table(config, command="c", machine="m").fill()

    cells = [BackdoorCell.model_validate(cell) for cell in done["cells"]]
    assert [(cell.adversary, cell.rule) for cell in cells] == [
        *(("none", "fedavg"), ("none", "krum"), ("badnets", "fedavg"), ("badnets", "krum"))
    ]
    assert again["cells"] == done["cells"]
    attacked = cells[-1]
    assert [point.round for point in attacked.curve] == [0, 1, 2]
    assert attacked.success == attacked.curve[1].success
    assert attacked.lasting == attacked.curve[2].success
    assert attacked.tpr in (0, 0.5, 1)
    assert attacked.fpr is not None
    assert cells[0].tpr is None
    page = Path(done["table_md"]).read_text()
    assert "| badnets | krum |" in page
    assert "malicious: clients 1, 4, 1 in every attacked round" in page
    assert "- settings: badnets.poisoned 0.5" in page
    assert "- rules left out: Bulyan needs at least 7 clients in a round" in page
    assert json.loads((tmp_path / "work/table/curves.json").read_text())["cells"]
    assert not any((tmp_path / "work" / "federation").glob("*"))


@pytest.mark.slow
def test_the_second_seed_is_run_for_rows_without_an_attack_and_for_those_that_differ(
    tmp_path: Path,
):
    few = {"adversaries": ("none", "label_flip"), "rules": ("fedavg",), "later": 0, "rounds": 1}
    config = small(tmp_path, seeds=(0, 1), margin=1.0, warm_up=0, **few)

    with held_study(config.folder):
        done = Table(config, command="c", machine="m").fill()

    assert [(cell["adversary"], cell["seed"]) for cell in done["cells"]] == [
        *(("none", 0), ("none", 1), ("label_flip", 0))
    ]
