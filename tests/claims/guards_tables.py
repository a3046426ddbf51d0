"""Tables and the record of the cells of guards, as Markdown whose figures have names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from guards_figures import (
    ATTACKS,
    GOAL,
    NETWORKS,
    SETS,
    TRAININGS,
    Cell,
    Detection,
    Estimate,
    Group,
    group_of,
    groups,
    missing,
    name_of,
    pooled,
    reaches_goal,
    saves,
)
from records import Figure

DETECTORS = ("kde", "bu", "lid", "safetynet", "mahalanobis", "deep", "smoothed", "rank_pca",
             "combination")  # fmt: skip
DENOISER = "contrastive"
EPS, BUDGETS = "2/255", ("2/255", "4/255")
_MATRIX = (
    "AUROC at 2/255 of every detector on the layer that validation images chose, mean of the "
    "attacks → under the worst attack for each image, on network and detector together:"
)
_COMBINATIONS = (
    "Share of images that are wrong and undetected at 5 % false positives, under the worst attack "
    "for each image, with the robust network alone and behind each guard (last column: another "
    "network, with a denoiser before it and a guard of its own; – is not measured):"
)
_SETS = {"XRAYS": "xrays", "MALARIA": "malaria", "SIX": "six"}  # variables, and folders of shards
_RUN = (
    "python tests/claims/guards.py --xrays build/claims/xrays --malaria build/claims/malaria",
    "    --six build/claims/six --weights $WEIGHTS --denoise --work build/claims/guards.work",
    "    --cells build/claims/guards --output build/claims/guards.json",
)
COMMANDS = (
    *(
        line
        for variable, name in _SETS.items()
        for line in (
            f"spark-submit jobs/ingest.py --source ${variable} "
            f"--samples build/claims/{name}_samples --image_size 64"
            + ("" if name == "six" else f" --labels ${variable}/labels.csv"),
            f"spark-submit jobs/shard.py --samples build/claims/{name}_samples "
            f"--shards build/claims/{name}",
        )
    ),
    " ".join(line.strip() for line in _RUN),
)


@dataclass
class Page:
    """Lines of Markdown, and the figures that their names in braces stand for."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def figure(self, key: str, found: Estimate | None, *, worse: str = "≤") -> str:
        """Return the place of a figure; ``worse`` stands before one that is only a bound."""
        if found is None:
            return "–"
        self.figures[key] = {
            "value": round(found.value, 4), "low": round(found.low, 4),
            "high": round(found.high, 4), "form": "share", "digits": 2, "interval": "95 %",
            "flagged": found.flagged, "path": f"figures[name={key}]value",
        }  # fmt: skip
        return f"{worse} {{{key}}}" if found.bound else f"{{{key}}}"

    def table(self, titles: Sequence[str], texts: int) -> None:
        """Begin a table whose first columns, ``texts`` of them, are words."""
        self.lines += [
            f"| {' | '.join(titles)} |",
            "| " + " | ".join(["---"] * texts + ["---:"] * (len(titles) - texts)) + " |",
        ]

    def row(self, cells: Sequence[str]) -> None:
        """Add a row to the table."""
        self.lines.append(f"| {' | '.join(cells)} |")


def tables(cells: Sequence[Cell]) -> str:
    """Return the tables with their figures."""
    found = _page(cells)
    shown = {key: str(Figure.model_validate(figure)) for key, figure in found.figures.items()}
    return "\n".join(found.lines).format_map(shown)


def record(cells: Sequence[Cell], hardware: str) -> dict[str, Any]:
    """Return the record of the cells that are there, measured on ``hardware``."""
    page, minutes = _page(cells), [cell["minutes"] for cell in cells]
    return {
        "what": "Guards of plain and of adversarially trained networks, and attacks through them.",
        "commands": list(COMMANDS),
        "result": "build/claims/guards.json",
        "commit": cells[-1]["commit"],
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "hardware": hardware,
        "seeds": sorted({cell["seed"] for cell in cells}),
        "minutes": None if None in minutes else round(sum(minutes), 1),
        "figures": page.figures,
        "text": [
            *_how(cells),
            "",
            *page.lines,
            "",
            "```bash",
            *COMMANDS[-3:-1],
            " \\\n".join(_RUN),
            "```",
        ],
    }


def _page(cells: Sequence[Cell]) -> Page:
    page, found = Page(), groups(cells)
    robust = {group: each for group, each in found.items() if group[2] == "robust"}
    _guards(page, found)
    page.lines += ["", *_goal(found), "", _MATRIX, ""]
    _matrix(page, found)
    if robust:
        page.lines += ["", _COMBINATIONS, ""]
        _combinations(page, robust)
        page.lines += ["", *_verdict(page, robust)]
    page.lines += ["", *_flags(cells), _missing(cells)]
    return page


def _words(group: Group) -> list[str]:
    data, network, training = group
    return [SETS[data], NETWORKS.get(network, network), TRAININGS[training]]


def _tried(found: Mapping[Group, Sequence[Cell]]) -> list[str]:
    """Return the detectors that a cell of ``found`` has."""
    cells = [Detection(cell, EPS) for group in found.values() for cell in group]
    return [name for name in DETECTORS if any(cell.layer_of(name) for cell in cells)]


def _guards(page: Page, found: Mapping[Group, Sequence[Cell]]) -> None:
    """Add the table of the guards that validation images chose, at 2/255."""
    page.table(
        ["data", "network", "training", "seeds", "guard", *ATTACKS.values(), "adaptive",
         "wrong and undetected, oblivious", "adaptive", "network alone"], 5,
    )  # fmt: skip
    for group, cells in found.items():
        key, seen = "_".join(group), [Detection(cell, EPS) for cell in cells]
        areas = {
            attack: pooled([each.oblivious(each.guard, attack) for each in seen])
            for attack in ATTACKS
        }
        worst = pooled([each.adaptive(each.guard) for each in seen])
        missed, missed_adaptive = (
            pooled([each.undetected(each.guard, adaptive=adaptive) for each in seen])
            for adaptive in (False, True)
        )
        page.row([
            *_words(group), str(len(cells)), ", ".join(dict.fromkeys(e.guard[0] for e in seen)),
            *(page.figure(f"{key}_{attack}", area) for attack, area in areas.items()),
            page.figure(f"{key}_adaptive", worst),
            page.figure(f"{key}_missed", missed),
            page.figure(f"{key}_missed_adaptive", missed_adaptive, worse="≥"),
            page.figure(f"{key}_alone", pooled([each.alone() for each in seen])),
        ])  # fmt: skip


def _goal(found: Mapping[Group, Sequence[Cell]]) -> list[str]:
    """Return what became of the goal for oblivious detection on plain networks."""
    plain = [cell for group, cells in found.items() if group[2] == "plain" for cell in cells]
    if not plain:
        return ["No plain network was measured yet."]
    reached = [name_of(*group_of(cell), cell["seed"]) for cell in plain if reaches_goal(cell)]
    which = f" ({', '.join(reached)})" if reached else ""
    return [
        f"The goal was an AUROC of at least {GOAL:g} of the guard under each of FGSM, PGD and C&W "
        "(its loss within the budget, which is margin PGD, and its nearest image, cut to it) "
        f"on plain networks, by attackers who do not know it: {len(reached)} of {len(plain)} cells "
        f"reach it{which}."
    ]


def _matrix(page: Page, found: Mapping[Group, Sequence[Cell]]) -> None:
    """Add AUROC of every detector: by attackers who do not know it, and by those who do."""
    names = _tried(found)
    page.table(["data", "network", "training", *names], 3)
    for group, cells in found.items():
        row, seen = [], [Detection(cell, EPS) for cell in cells]
        for name in names:
            key = f"{'_'.join(group)}_{name}"
            before = pooled([each.mean_oblivious(each.layer_of(name)) for each in seen])
            after = pooled([each.adaptive(each.layer_of(name)) for each in seen])
            row.append(f"{page.figure(key, before)} → {page.figure(f'{key}_worst', after)}")
        page.row([*_words(group), *row])


def _combinations(page: Page, robust: Mapping[Group, Sequence[Cell]]) -> None:
    """Add what is wrong and undetected for each guard of a robust network, and for none."""
    names = _tried(robust)
    page.table(["data", "network", "eps", "alone", *names, "denoiser"], 3)
    tried = [*((name, "detect") for name in names), (DENOISER, "denoise")]
    for group, cells in robust.items():
        for eps in BUDGETS:
            key = f"{'_'.join(group)}_{eps.partition('/')[0]}"
            alone = pooled([Detection(cell, eps).alone() for cell in cells])
            shown = [page.figure(f"{key}_no_guard", alone)]
            for name, kind in tried:
                seen = [Detection(cell, eps, kind) for cell in cells if kind in cell]
                left = pooled([e.undetected(e.layer_of(name), adaptive=True) for e in seen])
                shown.append(page.figure(f"{key}_left_{name}", left, worse="≥"))
            page.row([*_words(group)[:2], eps, *shown])


def _verdict(page: Page, robust: Mapping[Group, Sequence[Cell]]) -> list[str]:
    """Return what guards save, beside what refusing as many images by chance would."""
    sentences = [
        "What is wrong and undetected is a part of what is wrong, so a guard is never worse than "
        "the network alone on the same images. The guard that validation images chose counts where "
        "the 95 % interval of what it saves lies above what refusing images by chance saves, at "
        "the guard's own rate of false positives on test images:",
        "",
    ]
    for group, cells in robust.items():
        for eps in BUDGETS:
            if found := saves(cells, eps):
                share, chance = found
                counts = "it counts" if share.low > chance else "it does not count"
                key = f"{'_'.join(group)}_{eps.partition('/')[0]}_saved"
                sentences.append(
                    f"- {SETS[group[0]]}, {_words(group)[1]}, {eps}: it saves "
                    f"{page.figure(key, share)}, by chance {chance:.3f}: {counts}."
                )
    return sentences


def _flags(cells: Sequence[Cell]) -> list[str]:
    return [
        f"⚠ {name_of(cell['data'], cell['network'], cell['training'], cell['seed'])}: "
        f"{flag['sentence']}.  "
        for cell in cells
        for kind in ("detect", "denoise")
        for flag in cell.get(kind, {}).get("flags", ())
    ]


def _missing(cells: Sequence[Cell]) -> str:
    left = missing(cells)
    if not left:
        return "All planned cells are there."
    seeds: dict[str, list[str]] = {}
    for name in left:
        group, _, seed = name.rpartition("-")
        seeds.setdefault(group, []).append(seed)
    which = "; ".join(f"{group} ({', '.join(each)})" for group, each in seeds.items())
    return f"{len(left)} of the planned cells are not measured yet (seeds): {which}."


def _earlier(cells: Sequence[Cell], setup: Mapping[str, Any]) -> list[str]:
    """Return which cells are older than the attacks and the detectors of ``setup``."""
    found = [
        name_of(*group_of(cell), cell["seed"])
        for cell in cells
        if cell["setup"].keys() != setup.keys()
    ]
    if not found:
        return []
    listed = ", ".join(found)
    return [
        "Measured before there were margin PGD and `smoothed` here, and before C&W was learnt (–): "
        f"{listed}."
    ]


def _how(cells: Sequence[Cell]) -> list[str]:
    setup = max((cell["setup"] for cell in cells), key=len)
    return [
        f"Detectors on networks of 64 px images ({setup['epochs']} epochs; MobileNet-V2 from "
        "ImageNet weights, DenseNet121 from random ones; adversarial: trained against 2/255 by the "
        f"default recipe), fitted on {setup['reference']} clean training images and on those of "
        f"{setup['contrast']} others that one of {setup['learnt'].replace(',', ', ')} fools, "
        f"chosen by up to {setup['choosing']} attacked validation images, thresholds at 5 % false "
        f"positives. {setup['images']} test images a cell, all of "
        f"them attacked with {setup['steps']} steps by attackers who do not know the detector, and "
        f"with {setup['adaptive_steps']} steps through each detector at the layer that was chosen "
        f"({setup['searches']} weights of the weighted attack). In brackets: 95 % intervals that "
        "count patients (the malaria cells are of four), and for AUROC the fooled images where "
        "these are fewer. rank_pca was left out, since it costs a minute an image.",
        *_earlier(cells, setup),
        "",
        "AUROC of the guard at 2/255 under each attack by attackers who do not know it, and under "
        "the worst attack for each image, on network and guard together (–: the attack fools no "
        "image, or was not tried):",
    ]
