"""The evaluation job: the same report however it is cut, and one that goes on when killed."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def shards(write_shards) -> Path:
    return write_shards(rows=12, shards=2, side=32)


@pytest.fixture
def run(tmp_path: Path, shards: Path, network: Path, load_job) -> Run:
    """Return a function that runs the job with further arguments."""
    module = load_job("evaluate")

    def started(*more: str, folder: str = "work") -> tuple[int, dict[str, Any]]:
        output = tmp_path / f"{folder}.json"
        status = module.main(
            [
                f"--model={network}",
                f"--shards={shards}",
                "--attacks=fgsm,pgd",
                "--eps=0,2/255,0.03137254901960784",
                "--steps=3",
                "--bootstrap=20",
                f"--folder={tmp_path / folder}",
                f"--track.uri=sqlite:///{tmp_path / 'mlflow.db'}",
                "--track.system_metrics=false",
                f"--output={output}",
                *more,
            ]
        )
        return status, json.loads(output.read_text()) if output.exists() else {}

    return started


@pytest.mark.spark
@pytest.mark.slow
def test_the_report_is_the_same_however_it_is_shared_out_and_after_a_kill(
    spark, run: Run, tmp_path: Path
) -> None:
    _, whole = run("--piece=100")
    _, cut = run("--piece=5", "--batch_size=2", folder="cut")
    with one_worker(spark, tmp_path):
        _, alone = run("--piece=3", "--batch_size=5", folder="alone")
    (folder,) = (path for path in (tmp_path / "cut").iterdir() if path.is_dir())
    first, lost, last = sorted((folder / "pieces").iterdir())
    lost.unlink()
    before = [path.stat().st_mtime_ns for path in (first, last)]
    theirs = [folder / "notes.txt", folder / "pieces" / "notes.txt", folder / "report" / "x.html"]
    for path in theirs:
        path.write_text("theirs")
    status, resumed = run("--piece=5", "--batch_size=2", folder="cut")

    assert status == 0
    assert [path.stat().st_mtime_ns for path in (first, last)] == before
    assert [path.read_text() for path in theirs] == 3 * ["theirs"]
    assert whole["images"] == 12
    assert [row["eps"] for row in whole["attacks"]] == 2 * [0, 2 / 255, 8 / 255]
    assert whole["clean"]["accuracy"] == whole["attacks"][0]["accuracy"]
    for part in ("clean", "attacks", "worst_case"):
        assert without_sizes(cut[part]) == without_sizes(whole[part])
        assert without_sizes(alone[part]) == without_sizes(whole[part])
        assert resumed[part] == cut[part]
    assert "data:image/png;base64," in Path(whole["report"]).read_text()


@pytest.mark.spark
@pytest.mark.parametrize("gallery", [0, 2])
def test_images_of_patients_are_in_mlflow_only_if_that_is_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], gallery: int
) -> None:
    _, result = run(f"--gallery={gallery}", "--attacks=fgsm", "--sanity_images=0")

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    logged = {file.path for file in client.list_artifacts(result["mlflow"]["run_id"])}
    report = {path.name for path in Path(result["report"]).parent.iterdir()}
    assert ("images.png" in logged) == ("images.png" in report) == (gallery > 0)
    assert result["gallery"] == gallery
    said = capsys.readouterr().out
    assert ("2 images of patients" in said) == ("--gallery 0" in said) == (gallery > 0)


@contextmanager
def one_worker(spark, folder: Path) -> Iterator[None]:
    """Leave one of Spark's two workers: the other has a task that does not end before."""
    taken, freed = folder / "taken", folder / "freed"

    def hold(_row: int) -> None:
        taken.touch()
        while not freed.exists():
            time.sleep(0.05)

    holding = threading.Thread(
        target=lambda: spark.sparkContext.parallelize([0], 1).foreach(hold), daemon=True
    )
    holding.start()
    while not taken.exists():
        time.sleep(0.05)
    try:
        yield
        assert holding.is_alive(), "both workers were free"
    finally:
        freed.touch()
        holding.join()


def without_sizes(part: Any) -> Any:
    """Return figures without the mean sizes, which floating point sums in another order."""
    rows = part if isinstance(part, list) else [part]
    return [{k: v for k, v in row.items() if not k.endswith("_255")} for row in rows]


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("--model=/no/such/model", "'/no/such/model' is not a medspark model"),
        ("--model=/no/such.onnx", "there is no file '/no/such.onnx'"),
        ("--model=model.pkl", "can run code"),
        ("--model=models:/nope/1", "The model models:/nope/1 cannot be had from MLflow at sqlite:"),
        ("--model=runs:/zzz/model", "The model runs:/zzz/model cannot be had from MLflow at"),
        ("--shards=/no/such/shards", "There is no shard folder"),
        ("--attacks=fgsm,transfer", "transfer needs a surrogate"),
        ("--eps=0,2", "cannot be 2; write grey levels of 255 as 2/255."),
        ("--positive=ill", "there is no class 'ill'; there are a, b"),
        ("--atacks=fgsm", "did you mean attacks?"),
    ],
)
def test_misuse_is_one_sentence_before_spark_starts(run: Run, capsys, mistake, sentence) -> None:
    status, _ = run(mistake)

    assert status == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_damaged_onnx_file_is_one_sentence_before_spark_starts(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "x.onnx").write_bytes(content)

    status, _ = run(f"--model={tmp_path / 'x.onnx'}", "--attacks=square")

    assert status == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said == f"evaluate: '{tmp_path / 'x.onnx'}' cannot be opened as an ONNX model."
