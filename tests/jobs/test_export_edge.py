"""The export job: every backend and precision in one report, resumed, or refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

pytest.importorskip("onnx", reason="exports need onnx: pip install medspark[edge]")
pytest.importorskip("onnxruntime", reason="exports need onnxruntime: pip install medspark[edge]")

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, write_shards, network: Path, load_job) -> Run:
    """Return a function that runs the job with further arguments."""
    shards = write_shards(rows=12, shards=2, side=32)
    module = load_job("export_edge")

    def started(*more: str) -> tuple[int, dict[str, Any]]:
        output = tmp_path / "result.json"
        output.unlink(missing_ok=True)
        status = module.main(
            [
                f"--model={network}",
                f"--shards={shards}",
                "--eps=2/255",
                "--steps=2",
                "--queries=5",
                "--images=8",
                "--bootstrap=5",
                "--latency_images=5",
                f"--folder={tmp_path / 'exports'}",
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
def test_every_export_is_a_folder_an_mlflow_model_and_a_row_of_the_report(
    spark, run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("nncf", reason="OpenVINO exports need nncf: pip install medspark[openvino]")

    status, result = run("--precision=fp32,int8", "--backend=onnxruntime,openvino")

    assert status == 0
    found = {(each["backend"], each["precision"]): each for each in result["artifacts"]}
    assert len(found) == 4
    for each in found.values():
        assert Path(each["path"], "model.json").is_file()
        assert 0 < each["latency_ms"]["median"] <= each["latency_ms"]["p99"]
        assert each["parity"]["images"] == 12  # all of the split, though 8 are attacked
        assert each["worst_case"][0]["accuracy"] <= each["clean"]["accuracy"]
    assert found["onnxruntime", "int8"]["bytes"] < found["onnxruntime", "fp32"]["bytes"]
    report = Path(result["report"]).with_name("report.md").read_text()
    assert all(f"{backend} {precision}" in report for backend, precision in found)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs(["1"], f"tags.mlflow.parentRunId = '{result['mlflow']['run_id']}'")
    assert len([each for each in runs if each.outputs and each.outputs.model_outputs]) == 4


@pytest.mark.spark
@pytest.mark.slow
def test_the_same_command_again_makes_and_attacks_nothing_anew(spark, run: Run, tmp_path) -> None:
    _, first = run("--precision=int8", "--track.log_model=false")
    made = {path: path.stat().st_mtime_ns for path in _kept(tmp_path)}

    _, again = run("--precision=int8", "--track.log_model=false")

    assert made
    assert {path: path.stat().st_mtime_ns for path in _kept(tmp_path)} == made
    assert again["artifacts"][0]["worst_case"] == first["artifacts"][0]["worst_case"]


def _kept(folder: Path) -> list[Path]:
    exports = folder / "exports"
    return [*exports.glob("*/onnxruntime-int8/*"), *exports.glob("*/pieces/*/piece-*.npz")]


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (["--backend=tensorrt"], "backend"),
        (["--precision=int4"], "precision"),
        (["--split=val", "--positive=c"], "there is no class 'c'"),
        (["--model=none"], "'none' is not a medspark model"),
        (["--eps=2"], "eps"),
    ],
)
def test_misuse_is_one_sentence_before_spark_starts(run: Run, capsys, mistake, sentence) -> None:
    status, _ = run(*mistake)

    assert status == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message


def test_a_missing_package_is_named_with_its_extra(run: Run, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        "medspark.export.packages.find_spec", lambda name: None if name == "nncf" else name
    )

    status, _ = run("--backend=openvino")

    assert status == 2
    assert "pip install 'medspark[edge,openvino]'" in capsys.readouterr().err


def test_a_file_that_is_exported_already_is_refused(run: Run, capsys, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").touch()

    assert run(f"--model={tmp_path / 'x.onnx'}")[0] == 2
    assert "is exported already" in capsys.readouterr().err
