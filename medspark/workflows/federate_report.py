"""Report on a federation: a table of its rounds, of its clients, and a figure over the rounds."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from medspark.eps import eps_text
from medspark.evaluate.names import in_markdown
from medspark.evaluate.operating_point import decision_lines
from medspark.evaluate.sanity import SIGN
from medspark.federate.result import FederationResult, RoundFigures
from medspark.files import replacing, write_whole
from medspark.workflows.robustness_table import flag_lines, robustness_table

__all__ = ["describe_federation", "federation_figure", "summary", "write_federation_report"]

_HEAD = ("round", "clients", "left out", "loss", "clean acc.", "PGD acc.", "backdoor", "seconds")


# Which network the figures on all images are of, where several are possible.
_NETWORK = {
    "local": " The network has the mean of the clients' batch norms, which no client uses itself.",
    "reestimate": " The network has the batch norm statistics of validation images.",
}
# Whose images the figures of a client are on.
_CLIENTS = {
    "site": "Test images of the client's site.",
    "dirichlet": "Test images drawn with the client's shares of the classes.",
    "patient": "Groups of test patients; no client trained on one of them.",
}


def summary(result: FederationResult) -> str:
    """Return the text printed at the end of the job."""
    named = {f"federated ({result.mode}, {result.aggregate})": result}
    lines = ["", "Accuracy on the test images (%)", "", robustness_table(named)]
    lines += [*flag_lines(named), ""]
    left_out = sum(len(each.left_out) for each in result.rounds)
    lines.append(
        f"{len(result.rounds)} rounds of {result.clients} clients in {result.seconds:.0f} s, "
        f"{result.tasks} at once; {left_out} answers left out"
    )
    if result.epsilon is not None:
        lines.append(f"Privacy of a client: epsilon {result.epsilon:.2f}")
    lines += [f"Model: {result.model}", f"Report: {result.report}"]
    store = result.mlflow.get("uri") or ""
    if store.startswith("sqlite:"):
        lines.append(f"Dashboard: make ui    (mlflow ui --backend-store-uri {store})")
    elif store:
        lines.append(f"Dashboard: {store}")
    return "\n".join(lines)


def write_federation_report(folder: Path, result: FederationResult, *, eps: float) -> None:
    """Write report.md, report.html, rounds.csv and rounds.png to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "rounds.png") as draft:
        federation_figure(result, eps=eps).savefig(draft, dpi=150, format="png")
    write_whole(folder / "rounds.csv", _csv(result.rounds))
    text = describe_federation(result)
    write_whole(folder / "report.md", f"{text}\n![Accuracy over the rounds](rounds.png)\n")
    page = (
        '<!doctype html><meta charset="utf-8"><title>Federation</title>'
        f"<pre>{html.escape(text)}</pre>"
        '<img src="rounds.png" alt="Accuracy over the rounds" style="max-width:100%">\n'
    )
    write_whole(folder / "report.html", page)


def describe_federation(result: FederationResult) -> str:
    """Return the report on a federation as Markdown."""
    flagged = "; ".join(flag.sentence for flag in result.triggered_flags)
    verdict = f"{SIGN} do not trust them: {flagged}" if flagged else "no sanity check objects"
    private = "" if result.epsilon is None else f" User-level epsilon: {result.epsilon:.2f}."
    return "\n".join([
        f"# Federation of {result.clients} clients: {result.architecture}, {result.mode}, "
        f"{result.aggregate}",
        "",
        f"{result.train_images} training images, data digest `{result.dataset_digest[:16]}`, "
        f"{len(result.rounds)} rounds, {result.steps} steps of clients, batch norm "
        f"{result.batch_norm}.{private}",
        "",
        robustness_table({"": result}),
        "",
        f"On {result.images} test images; {verdict}.{_NETWORK.get(result.batch_norm, '')}",
        "",
        *([*decision_lines(result), ""] if result.decision is not None else []),
        *_clients(result),
        "## Rounds",
        "",
        *_table(_HEAD, [_row(each) for each in result.rounds]),
        "",
        *_left_out(result.rounds),
    ])  # fmt: skip


def federation_figure(result: FederationResult, *, eps: float) -> Figure:
    """Draw the accuracy on validation images over the rounds, clean and under PGD at ``eps``."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    seen = [each for each in result.rounds if each.clean is not None]
    numbers = [each.round + 1 for each in seen]
    clean = [each.clean.accuracy if each.clean else None for each in seen]
    attacked = [each.attacks[0].accuracy if each.attacks else None for each in seen]
    success = [each.backdoor for each in seen]
    named = {"clean": clean, f"PGD {eps_text(eps)}": attacked, "backdoor success": success}
    for label, values in named.items():
        if not any(value is not None for value in values):
            continue
        pairs = [(n, 100 * v) for n, v in zip(numbers, values, strict=True) if v is not None]
        axes.plot([n for n, _ in pairs], [v for _, v in pairs], marker="o", ms=3, label=label)
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy or success, %")
    axes.set_ylim(0, 102)
    axes.set_xlim(0.5, len(result.rounds) + 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        figure.legend(frameon=False, loc="outside right upper")
    else:
        axes.text(0.5, 0.5, "no round was validated", ha="center", transform=axes.transAxes)
    return figure


def _clients(result: FederationResult) -> list[str]:
    if not result.per_client:
        return []
    rows = [
        (
            in_markdown(each.site or str(each.client)),
            str(each.images),
            _percent(each.clean.accuracy),
            *(_percent(worst.accuracy) for worst in each.worst_case),
        )
        for each in result.per_client
    ]
    budgets = [f"worst {eps_text(worst.eps)}" for worst in result.worst_case]
    head = ("client", "test images", "clean acc.", *budgets)
    own = result.per_client[0].own_network
    which = " In the network with the client's own batch norms." if own else ""
    about = f"{_CLIENTS.get(result.clients_by, '')}{which}".strip()
    return ["## Clients", "", *([about, ""] if about else []), *_table(head, rows), ""]


def _row(each: RoundFigures) -> tuple[str, ...]:
    return (
        str(each.round + 1),
        str(len(each.clients)),
        str(len(each.left_out)),
        f"{each.loss:.3f}",
        _percent(each.clean.accuracy if each.clean else None),
        _percent(each.attacks[0].accuracy if each.attacks else None),
        _percent(each.backdoor),
        f"{each.seconds:.2f}",
    )


def _left_out(rounds: Sequence[RoundFigures]) -> list[str]:
    lines = [
        f"- round {each.round + 1}, client {client}: {in_markdown(reason)}"
        for each in rounds
        for client, reason in each.left_out.items()
    ]
    return ["## Left out", "", *lines, ""] if lines else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _csv(rounds: Sequence[RoundFigures]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_HEAD)
    writer.writerows(_row(each) for each in rounds)
    return stream.getvalue()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
