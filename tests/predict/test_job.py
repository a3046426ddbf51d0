"""The command: bad input is one sentence before Spark starts, and the summary adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medspark.jobs import predict
from medspark.workflows.predict import PredictResult

RESULT = PredictResult(
    model="m", model_digest="d", files_found=7, answered=5, quarantined=2,
    quarantine_reasons={"truncated": 2}, labels={"ill": 1, "well": 4}, done_before=3, done_now=4,
    seconds=2.0, images_per_second=2.0, answers="/out/answers/g", quarantine_file=None,
    paths_file="/home/paths.csv",
)  # fmt: skip


@pytest.fixture
def words(settings, pictures: Path, tmp_path: Path, monkeypatch) -> dict[str, str]:
    """The words of a command that would start Spark, which fails the test."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("Spark was started")

    monkeypatch.setattr(predict, "spark_session", started)
    given = settings(pictures, tmp_path / "answers")
    named = {name: str(given[name]) for name in ("model", "source", "answers", "paths_file")}
    return named | {
        "privacy.key_file": str(given["privacy"]["key_file"]),
        "output": str(tmp_path / "result.json"),
    }


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", "/nowhere", "is not a medspark model"),
        ("model", "weights.pt", "pickled"),
        ("source", "/nowhere", "There is no source folder"),
        ("batch_size", "0", "batch_size"),
        ("paths_file", "{source}/paths.csv", "names files of the archive"),
        ("paths_file", "{answers}/paths.csv", "names files of the archive"),
        ("limits.file_bytes", "few", "limits.file_bytes"),
    ],
)
def test_bad_input_is_one_sentence_before_spark(words, key, value, said, capsys) -> None:
    words[key] = value.format(**words)

    status = predict.main([word for name, text in words.items() for word in (f"--{name}", text)])

    error = capsys.readouterr().err
    assert (status, len(error.splitlines())) == (2, 1), error
    assert said in error
    assert not Path(words["answers"]).exists()


def test_weights_that_are_no_network_are_refused_before_spark(words, tmp_path, capsys) -> None:
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in Path(words["model"]).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    card = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(card | {"classes": ["a", "b", "c"]}))
    words["model"] = str(copy)

    assert predict.main([w for name, text in words.items() for w in (f"--{name}", text)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_summary_says_the_sum_the_labels_and_the_reasons() -> None:
    text = predict._summary(RESULT)

    assert "7 files found = 5 answered + 2 quarantined  (3 before, 4 now, 2.0 a second)" in text
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["1", "ill"], ["4", "well"], ["2", "truncated"],
    ]  # fmt: skip
    assert text.endswith("answers: /out/answers/g")
