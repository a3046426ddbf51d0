"""Predictions on Spark: every file has one row, whatever happens to files, jobs and archives."""

from __future__ import annotations

import base64
import csv
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from prediction_runs import by_path, picture, private, rows

from medspark.errors import UsageError
from medspark.images.phantom import CANARY, ArchiveSummary
from medspark.models.file_predictor import FilePredictor
from medspark.predict.answer_task import AnswerFiles
from medspark.predict.config import PredictConfig
from medspark.predict.folder import PredictionFolder
from medspark.workflows.predict import Prediction, PredictResult

pytestmark = [pytest.mark.spark, pytest.mark.slow]


@pytest.fixture(scope="module")
def predicted(
    run, phantom: ArchiveSummary, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PredictResult]:
    answers = tmp_path_factory.mktemp("predicted") / "answers"
    return answers, run(phantom.folder, answers)


def test_files_found_are_answered_or_quarantined_each_once(
    predicted: tuple[Path, PredictResult], phantom: ArchiveSummary
) -> None:
    answers, result = predicted

    found = rows(answers)
    assert result.files_found == phantom.files + 1 == len(found)  # the table of labels is one more
    assert len({row["file_key"] for row in found}) == len(found)
    assert result.answered + result.quarantined == result.files_found == result.done_now
    assert result.answered >= phantom.images + phantom.duplicates
    assert sum(result.quarantine_reasons.values()) == result.quarantined > 0
    assert sum(result.labels.values()) == result.answered
    assert result.images_per_second == pytest.approx(result.done_now / result.seconds)


def test_a_row_is_what_a_server_answers_for_the_file(
    predicted: tuple[Path, PredictResult], model: Path
) -> None:
    named = by_path(predicted[0])
    answered = [path for path, row in named.items() if "label" in row][:20]

    served = FilePredictor.load(model)
    answers = served([base64.b64encode(path.read_bytes()).decode() for path in answered])
    served.close()

    for path, answer in zip(answered, answers, strict=True):
        row = named[path]
        assert row["label"] == answer["label"]
        assert dict(row["probabilities"])["a"] == pytest.approx(answer["a"], abs=1e-5)


def test_no_file_and_no_patient_is_named_in_the_folder(
    predicted: tuple[Path, PredictResult], phantom: ArchiveSummary
) -> None:
    answers, _ = predicted

    stored = repr(rows(answers)) + (answers / "manifest.json").read_text()

    with Path(phantom.labels).open(encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            for name in (Path(row["path"]).name, row["patient_id"]):
                # The digits of keys and probabilities may hold those of a name by chance.
                assert not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", stored)
    assert CANARY not in stored
    assert phantom.folder not in stored


def test_private_lists_name_the_files_to_their_owner_alone(
    predicted: tuple[Path, PredictResult], phantom: ArchiveSummary
) -> None:
    answers, result = predicted

    paths, quarantine = (private(answers, name) for name in ("paths", "quarantine"))

    assert (result.paths_file, result.quarantine_file) == (str(paths), str(quarantine))
    bad = list(csv.DictReader(quarantine.open(encoding="utf-8", newline="")))
    assert len(bad) == result.quarantined
    assert all(Path(row["path"]).is_file() for row in bad)
    for listed in (paths, quarantine):
        assert stat.S_IMODE(listed.stat().st_mode) == 0o600


def test_a_network_and_its_export_give_the_same_rows(
    predicted: tuple[Path, PredictResult], phantom: ArchiveSummary, run, model, tmp_path
) -> None:
    pytest.importorskip("onnxruntime", reason="exports need onnxruntime")
    from test_runtime import export

    folder = export(tmp_path / "exported", model)

    result = run(phantom.folder, tmp_path / "answers", model=str(folder))

    assert result.labels == predicted[1].labels
    wanted, found = (
        {row["file_key"]: row for row in rows(place)}
        for place in (predicted[0], tmp_path / "answers")
    )
    assert found.keys() == wanted.keys()
    for key, row in found.items():
        assert row.get("label") == wanted[key].get("label")
        assert row.get("reason") == wanted[key].get("reason")
        assert row.get("probability") == pytest.approx(wanted[key].get("probability"), abs=1e-4)


def test_files_that_tasks_of_killed_jobs_finished_are_not_answered_again_and_count_once(
    run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, planted = tmp_path / "answers", PredictionFolder(str(tmp_path / "answers"))
    commit, kept = PredictionFolder.commit, {}

    def killed(folder: PredictionFolder, manifest: Any) -> None:
        if manifest.generation is None:
            return commit(folder, manifest)
        kept.update({name: (answers / name).read_bytes() for name in folder.pieces()})
        raise KeyboardInterrupt

    monkeypatch.setattr(PredictionFolder, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(pictures, answers)
    monkeypatch.undo()
    for number, (name, content) in enumerate(kept.items()):  # as of an attempt that was lost
        (answers / f"work/{number:032x}-{name.rpartition('-')[2]}").write_bytes(content)
    assert planted.finished() == 10

    result = run(pictures, answers)

    assert (result.files_found, result.done_before, result.done_now) == (5, 5, 0)
    assert (result.answered, result.quarantined, len(by_path(answers))) == (4, 1, 5)
    assert planted.pieces() == []
    assert not (answers / "staging").exists()


def test_new_and_changed_files_are_answered_and_deleted_ones_leave(
    run, pictures: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "answers"
    first = run(pictures, answers)
    before = {path.name: row for path, row in by_path(answers).items()}
    picture(pictures / "new.png", 7)
    picture(pictures / "mary-0.png", 8)
    (pictures / "mary-1.png").unlink()
    (pictures / "notes.txt").unlink()

    second = run(pictures, answers)

    after = {path.name: row for path, row in by_path(answers).items()}
    assert after.keys() == {"new.png", "mary-0.png", "mary-2.png", "mary-3.png"}
    assert (second.done_before, second.done_now, second.quarantined) == (2, 2, 0)
    assert after["mary-0.png"]["probability"] != before["mary-0.png"]["probability"]
    assert after["mary-2.png"] == before["mary-2.png"]
    assert not Path(first.answers).exists()
    assert list(csv.DictReader(private(answers, "quarantine").open())) == []


def test_a_model_that_changed_is_refused_where_the_answers_of_another_are(
    predicted: tuple[Path, PredictResult], phantom: ArchiveSummary, settings, model, tmp_path
) -> None:
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    card = (model / "model.json").read_text().replace('"temperature": 1.5', '"temperature": 1.4')
    (tmp_path / "model.json").write_text(card)

    changed = settings(phantom.folder, predicted[0], model=str(tmp_path))
    with pytest.raises(UsageError, match="answers of another model"):
        Prediction(PredictConfig.model_validate(changed))
    moved = settings(tmp_path, predicted[0])
    with pytest.raises(UsageError, match="another archive"):
        Prediction(PredictConfig.model_validate(moved))


def test_the_piece_of_a_second_attempt_of_a_task_is_not_counted(
    run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medspark.predict import pipeline

    answer = pipeline._Prediction._answer

    def answered_twice(self: Any, todo: Any, count: int) -> list[str]:
        reported = answer(self, todo, count)
        piece = tmp_path / "answers" / reported[0]
        number = piece.stem.partition("-")[2]
        (piece.parent / f"{'0' * 32}-{number}.parquet").write_bytes(piece.read_bytes())
        return reported

    monkeypatch.setattr(pipeline._Prediction, "_answer", answered_twice)

    result = run(pictures, tmp_path / "answers")

    found = rows(tmp_path / "answers")
    assert len(found) == len({row["file_key"] for row in found}) == result.files_found
    assert PredictionFolder(str(tmp_path / "answers")).pieces() == []


def test_executors_that_do_not_share_the_folder_are_noticed_before_the_commit(
    run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medspark.errors import RunError
    from medspark.predict import pipeline

    (tmp_path / "elsewhere" / "work").mkdir(parents=True)

    def elsewhere(*given: Any) -> AnswerFiles:
        return AnswerFiles(*given[:2], str(tmp_path / "elsewhere"), given[3])

    monkeypatch.setattr(pipeline, "AnswerFiles", elsewhere)

    with pytest.raises(RunError, match="may not share the folder"):
        run(pictures, tmp_path / "answers")

    manifest = PredictionFolder(str(tmp_path / "answers")).manifest()
    assert manifest is not None
    assert manifest.generation is None
