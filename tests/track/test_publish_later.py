"""A run's folder may come from anybody: what it says is shown, and only what lies in it is sent."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from medspark.errors import RunError
from medspark.track.__main__ import main as publish_later
from medspark.track.config import TrackConfig
from medspark.track.journal import Journal
from medspark.track.runs import tracked
from medspark.track.spool import Ending, ModelEntry, RunEntry, Spool, State, read_state

QUIET = {"system_metrics": False, "patience_seconds": 0}
SECRET = "hunter2"
ENTRY = RunEntry(
    name="chest",
    config={
        "track": {"uri": f"https://me:{SECRET}@mlflow.org"},
        "spark": {"settings": {"spark.authenticate.secret": SECRET, "spark.master": "yarn"}},
    },
    params={"api_token": SECRET},
    tags={"from": f"https://me:{SECRET}@mlflow.org"},
)
MODEL = ModelEntry(
    folder=Path("model"), loader="medspark.models.predictor:Predictor.load", input_shape=(1,),
    outputs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlruns') / 'mlflow.db'}"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """The folder of a run that ended while MLflow was away."""
    folder = tmp_path / "run"
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "table.md").write_text("| eps |")
    state = State(entry=ENTRY, uri="http://127.0.0.1:9", experiment="medspark")
    spool = Spool.open(folder, state, uri="http://127.0.0.1:9")
    spool.update(ending=Ending(status="FINISHED", artifacts=Path("report")))
    return folder


def _files(store: str, folder: Path) -> set[str]:
    run_id = read_state(folder).run_id
    return {file.path for file in MlflowClient(store).list_artifacts(run_id)} if run_id else set()


def _change(folder: Path, **ending: object) -> None:
    """Write into the folder's record, as a stranger would."""
    record = json.loads((folder / "run.json").read_text())
    record["ending"] |= ending
    (folder / "run.json").write_text(json.dumps(record))


def test_a_run_goes_to_the_users_store_and_not_where_its_folder_says(
    recorded: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)

    assert publish_later([str(recorded)]) == 0

    assert _files(store, recorded) == {"config.yaml", "table.md", "versions.json"}
    assert f"recorded for http://127.0.0.1:9, goes to {store}" in capsys.readouterr().err


def test_a_folder_that_was_moved_is_published_all_the_same(recorded: Path, store: str) -> None:
    moved = recorded.rename(recorded.with_name("elsewhere"))

    assert publish_later(["--uri", store, str(moved)]) == 0

    assert "table.md" in _files(store, moved)


def test_report_and_model_beside_the_runs_folder_are_kept_in_it(tmp_path: Path, store: str) -> None:
    for name in ("report", "net"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.md").write_text("| eps |")
    model = MODEL.model_copy(update={"folder": tmp_path / "net"})
    with tracked(tmp_path / "run", TrackConfig(uri="http://127.0.0.1:9", **QUIET), ENTRY) as run:
        run.end("FINISHED", artifacts=tmp_path / "report", model=model, patience_seconds=0)

    kept = Spool.reopen(tmp_path / "run", uri=store)
    assert kept.state.ending is not None
    assert kept.state.ending.model is not None
    assert (kept.own(kept.state.ending.model.folder) / "table.md").is_file()
    kept.update(ending=kept.state.ending.model_copy(update={"model": None}))  # it is no network
    assert publish_later(["--uri", store, str(tmp_path / "run")]) == 0

    assert "table.md" in _files(store, tmp_path / "run")


def test_a_pipe_in_the_report_is_not_waited_for(recorded: Path, store: str) -> None:
    os.mkfifo(recorded / "report" / "pipe")

    assert publish_later(["--uri", store, str(recorded)]) == 1


@pytest.mark.parametrize("way", ["absolute", "upwards", "link", "linked file", "model"])
def test_files_from_outside_the_folder_are_refused_and_nothing_is_sent(
    way: str, recorded: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    private = recorded.parent / "private"
    private.mkdir()
    (private / "id_rsa").write_text("a key")
    (recorded / "link").symlink_to(private)
    if way == "linked file":
        (recorded / "report" / "id_rsa").symlink_to(private / "id_rsa")
    elif way == "model":
        _change(recorded, model=json.loads(MODEL.model_dump_json()) | {"folder": str(private)})
    else:
        named = {"absolute": str(private), "upwards": "../private", "link": "link"}
        _change(recorded, artifacts=named[way])

    assert publish_later(["--uri", store, str(recorded)]) == 1

    assert "lies outside" in capsys.readouterr().err
    assert read_state(recorded).run_id is None


@given(st.lists(st.sampled_from(["..", "a", "report", "link", "/"]), max_size=6))
def test_what_is_published_lies_in_the_folder_whatever_its_record_says(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "run")
        (folder / "report" / "a").mkdir(parents=True)
        (folder / "link").symlink_to(place)
        (folder / "run.json").write_text(
            State(entry=ENTRY, uri="x", experiment="x").model_dump_json()
        )
        spool = Spool.reopen(folder, uri="x")
        try:
            found = spool.own(Path(*parts))
        except RunError:
            return
        inside = Path(os.path.realpath(folder))
        reached = [found, *found.rglob("*")]
        assert all(Path(os.path.realpath(path)).is_relative_to(inside) for path in reached)


@pytest.mark.parametrize("loader", ["os:system", "medspark.x", "medspark.x:y()", "subprocess:run"])
def test_a_folder_cannot_choose_what_opens_its_model(loader: str, recorded: Path) -> None:
    _change(recorded, model=json.loads(MODEL.model_dump_json()) | {"loader": loader})

    with pytest.raises(RunError, match=r"run\.json is no record of a run: ending\.model\.loader"):
        read_state(recorded)


@pytest.mark.parametrize("name", ["../../stolen", "/Shared/x", ".."])
def test_an_experiment_cannot_be_named_out_of_the_store(
    name: str, recorded: Path, store: str
) -> None:
    record = json.loads((recorded / "run.json").read_text())
    (recorded / "run.json").write_text(json.dumps(record | {"experiment": name}))

    assert publish_later(["--uri", store, str(recorded)]) == 0

    experiment = MlflowClient(store).get_experiment_by_name(name)
    below = (Path(store.removeprefix("sqlite:///")).parent / "artifacts").as_uri() + "/"
    assert str(experiment.artifact_location).startswith(below)
    assert ".." not in experiment.artifact_location


def test_what_one_store_has_is_sent_to_another_from_the_beginning(
    tmp_path: Path, store: str
) -> None:
    other = f"sqlite:///{tmp_path / 'other.db'}"
    with tracked(tmp_path / "run", TrackConfig(uri=other, **QUIET), ENTRY) as run:
        Journal(run.spool.journal, flush_seconds=0).record(7, {"loss": 0.5})
        run.end("FINISHED")
    first = read_state(tmp_path / "run").run_id

    assert publish_later(["--uri", store, str(tmp_path / "run")]) == 0

    second = read_state(tmp_path / "run").run_id
    assert second != first
    assert MlflowClient(store).get_run(second).data.metrics == {"loss": 0.5}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 10_000, b"\xff", b"{}", b'{"entry": 3}'], ids=range(6)
)
def test_a_damaged_record_is_one_sentence(
    content: bytes, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recorded / "run.json").write_bytes(content)

    assert publish_later(["--uri", "x", str(recorded)]) == 1

    said = capsys.readouterr().err.strip()
    assert "run.json is no record of a run" in said
    assert len(said.splitlines()) == 1


def test_a_record_that_is_a_pipe_or_endless_is_not_read(recorded: Path) -> None:
    for place in ("pipe", "/dev/zero"):
        (recorded / "run.json").unlink()
        if place == "pipe":
            os.mkfifo(recorded / "run.json")
        else:
            (recorded / "run.json").symlink_to(place)

        with pytest.raises(RunError, match="cannot be read: it is no regular file"):
            read_state(recorded)


def test_a_figure_that_is_no_number_comes_back_from_the_folder(tmp_path: Path) -> None:
    state = State(entry=ENTRY, uri="x", experiment="x")
    Spool.open(tmp_path, state, uri="x").update(
        ending=Ending(status="FINISHED", summary={"auroc": math.nan})
    )

    ending = read_state(tmp_path).ending

    assert ending is not None
    assert math.isnan(ending.summary["auroc"])


def test_no_secret_is_in_the_folder_or_in_mlflow(tmp_path: Path, store: str) -> None:
    with pytest.raises(ConnectionError), tracked(
        tmp_path / "run", TrackConfig(uri=store, **QUIET), ENTRY
    ) as run:  # fmt: skip
        raise ConnectionError(f"no answer from https://me:{SECRET}@mlflow.org")

    logged = MlflowClient(store).get_run(run.reference["run_id"]).data
    assert logged.params["track.uri"] == "https://***@mlflow.org"
    assert logged.params["spark.settings.spark.master"] == "yarn"
    assert "https://***@mlflow.org" in logged.tags["medspark.error"]
    for place in (tmp_path, Path(store.removeprefix("sqlite:///")).parent):
        _holds_no_secret(place)


def test_a_server_that_is_away_is_named_without_the_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackConfig(uri=f"http://me:{SECRET}@127.0.0.1:9", **QUIET)

    with tracked(tmp_path / "run", config, ENTRY) as run:
        run.end("FINISHED", patience_seconds=0)

    assert "--uri 'http://***@127.0.0.1:9'" in caplog.text
    assert SECRET not in caplog.text
    assert run.reference["uri"] == "http://***@127.0.0.1:9"
    _holds_no_secret(tmp_path)


def test_a_record_of_an_earlier_version_loses_its_secrets_when_it_is_published(
    recorded: Path, store: str
) -> None:
    record = json.loads((recorded / "run.json").read_text())
    record |= {
        "uri": f"http://me:{SECRET}@127.0.0.1:9",
        "entry": json.loads(ENTRY.model_dump_json()),
    }
    (recorded / "run.json").write_text(json.dumps(record))

    assert publish_later(["--uri", store, str(recorded)]) == 0

    _holds_no_secret(recorded)
    run_id = read_state(recorded).run_id
    assert MlflowClient(store).get_run(run_id).data.params["api_token"] == "***"


@pytest.mark.slow
def test_a_server_behind_a_password_takes_a_run_and_prints_no_password(
    tmp_path: Path, serve: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "x.md").write_text("x")
    address = serve(
        "server", "--backend-store-uri", f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}",
        "--artifacts-destination", str(tmp_path / "server" / "artifacts"), page="health",
    )  # fmt: skip
    config = TrackConfig(uri=address.replace("://", f"://me:{SECRET}@"), system_metrics=False)

    with tracked(tmp_path / "run", config, ENTRY) as run:
        run.end("FINISHED", artifacts=tmp_path / "report")

    assert MlflowClient(address).get_run(run.reference["run_id"]).info.status == "FINISHED"
    assert SECRET not in "".join(capfd.readouterr())
    _holds_no_secret(tmp_path)


def _holds_no_secret(place: Path) -> None:
    files = [path for path in place.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
