"""The MLflow page of a sweep in a real browser: the runs are there, and the charts are drawn."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from medspark.track.config import TrackConfig
from medspark.track.run_list import METRICS, PARAMS, run_list
from medspark.track.runs import tracked
from medspark.track.spool import RunEntry

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).parents[2]
SHOT = ROOT / "build" / "dashboard.png"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A store with a sweep of four cells, and the address of its charts."""
    folder = tmp_path_factory.mktemp("dashboard")
    config = TrackConfig(
        uri=f"sqlite:///{folder / 'mlflow.db'}", system_metrics=False, patience_seconds=0
    )
    with tracked(folder / "sweep", config, RunEntry(name="sweep of four")) as parent:
        below = config.model_copy(update={"parent_run_id": parent.reference["run_id"]})
        for mode in ("standard", "fused_noise"):
            for world in (1, 2):
                name = f"{mode} on {world}"
                entry = RunEntry(name=name, params={"world_size": world, "mode": mode})
                with tracked(folder / name, below, entry) as run:
                    figures = {
                        "scale/images_per_second": 100.0 * world,
                        "scale/efficiency": 0.9,
                        "test/clean/auroc": 0.95,
                    }
                    run.end("FINISHED", summary=figures)
        parent.end("FINISHED", tags={"mlflow.note.content": "What was seen."})
        charts = parent.charts_of_children(order_by="scale/images_per_second")
    # MLflow folds the runs of a sweep below their parent; a training of its own is in the list.
    params = {"model": "densenet121", "mode": "fused", "world_size": 4, "data_share": 0.35}
    with tracked(folder / "alone", config, RunEntry(name="alone", params=params)) as run:
        figures = {"images_per_second": 321.0, "clean_auroc": 0.953, "worst_case": 0.717}
        run.end("FINISHED", summary=figures)
    return str(config.uri), charts


@pytest.fixture(scope="module")
def server(sweep: tuple[str, str], serve: Callable[..., str]) -> str:
    return serve("ui", "--backend-store-uri", sweep[0], page="health")


def _browse(*options: object) -> str:
    assert CHROMIUM is not None
    # Virtual time runs ahead as fast as the page allows, and waits for what it still fetches.
    always = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000")
    done = subprocess.run(
        [CHROMIUM, *always, "--window-size=1700,1300", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done.stdout


def test_the_charts_compare_the_cells_of_a_sweep_without_hand_work(
    sweep: tuple[str, str], server: str
) -> None:
    SHOT.parent.mkdir(exist_ok=True)

    page = _browse("--dump-dom", f"{server}/{sweep[1]}")
    _browse(f"--screenshot={SHOT}", f"{server}/{sweep[1]}")

    for run in ("standard on 1", "standard on 2", "fused_noise on 1", "fused_noise on 2"):
        assert run in page
    assert "sweep of four" not in page  # the parent would be a bar of nothing
    assert "scale/images_per_second" in page
    assert "main-svg" in page, "no chart was drawn"
    assert SHOT.read_bytes().startswith(b"\x89PNG")
    assert SHOT.stat().st_size > 50_000


def test_the_note_leads_to_a_list_with_what_people_compare(server: str) -> None:
    address = run_list("1")

    page = _browse("--dump-dom", "--window-size=2600,1300", f"{server}/{address}")

    assert address.replace("&", "&amp;") in page, "the note has no link"
    for column in (*PARAMS, *METRICS):
        assert f">{column}<" in page
    for value in ("densenet121", "fused", "0.35", "321", "0.953", "0.717"):
        assert value in page
