"""Pieces of an evaluation: done once, identified by a hash of the inputs, and complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.evaluate.config import AttackSettings
from medspark.evaluate.decision import probability
from medspark.evaluate.pieces import Job, fingerprint
from medspark.models.backbones import build
from medspark.models.card import Decision, Rate, read_card, write_card
from medspark.models.checkpoint import describe, save_classifier
from medspark.models.config import ModelConfig

ROWS, SIDE = 10, 32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    card = describe(network, classes=("a", "b"), height=SIDE, width=SIDE)
    save_classifier(tmp_path / "model", network, card)
    return tmp_path / "model"


@pytest.fixture
def job(model: Path, write_shards, tmp_path: Path) -> Job:
    shards = write_shards(rows=ROWS, shards=2, side=SIDE)
    config = AttackSettings(attacks=("square",), eps=(0.1,), queries=20, batch_size=4)
    work = tmp_path / "work"
    work.mkdir()
    return Job(model, shards, "test", config, total=ROWS, piece=4, work=work, surrogates=())


def finished(job: Job) -> dict[str, np.ndarray]:
    for number in job.missing():
        job.do(number)
    return job.arrays()


def test_pieces_hold_every_image_once_and_none_is_done_twice(job: Job) -> None:
    assert job.missing() == [0, 1, 2]
    assert finished(job)["rows"].tolist() == list(range(ROWS))
    written = job.file(1).stat().st_mtime_ns

    job.do(1)

    assert job.missing() == []
    assert job.file(1).stat().st_mtime_ns == written


DAMAGES = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a hole of zeros": lambda data: data[:60] + bytes(len(data) - 120) + data[-60:],
    "no archive": lambda data: b"piece",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_missing_and_done_again(job: Job, damage: str) -> None:
    whole = finished(job)
    file = job.file(1)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))

    assert job.missing() == [1]
    again = finished(job)
    assert job.missing() == []
    assert all(np.array_equal(again[key], whole[key]) for key in whole)


def test_a_piece_of_other_images_is_missing(job: Job) -> None:
    finished(job)
    shutil.copy(job.file(0), job.file(1))

    assert job.missing() == [1]
    assert job.done() == ROWS


def test_a_piece_is_on_the_disk_before_it_has_its_name_and_a_full_disk_leaves_none(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: order.append("fsync"))
    really = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *to: order.append("named") or really(*to))

    job.do(0)

    assert order == ["fsync", "named"]
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError, match="No space left"):
        job.do(1)
    assert list(job.work.iterdir()) == [job.file(0)]


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_evaluation_is_named_by_network_data_and_attacks_not_by_its_place(job: Job) -> None:
    def name(**changes: object) -> str:
        return fingerprint(replace(job, **changes), dataset_digest="d")

    assert name(work=Path("elsewhere")) == name()
    other = [
        name(total=5),
        name(config=job.config.model_copy(update={"images": 5})),
        name(config=job.config.model_copy(update={"queries": 21})),
        fingerprint(job, dataset_digest="e"),
    ]
    assert len({name(), *other}) == 5


def test_an_evaluation_attacks_the_rows_of_a_trainings_report_and_probes_the_first_of_them(
    job: Job,
) -> None:
    few = job.config.model_copy(update={"images": 6, "sanity_images": 3})
    drawn = replace(job, config=few)
    arrays = finished(drawn)

    assert arrays["rows"].tolist() == few.rows(ROWS).tolist() != list(range(6))
    assert (~np.isnan(arrays["unsteady"])).tolist() == [True] * 3 + [False] * 3


def test_an_earlier_evaluation_of_the_first_images_is_not_taken_for_one_of_drawn_images(
    job: Job,
) -> None:
    few = replace(job, config=job.config.model_copy(update={"images": 5}))
    earlier = replace(job, total=5)  # the configuration of its attacks did not say how many

    assert fingerprint(few, dataset_digest="d") != fingerprint(earlier, dataset_digest="d")


@pytest.mark.parametrize(
    ("steps", "sanity_images", "found"), [(20, 9, True), (10, 0, True), (10, 9, False)]
)
def test_pieces_of_an_earlier_version_are_found_where_their_probes_took_as_many_steps(
    job: Job, steps: int, sanity_images: int, found: bool
) -> None:
    changes = {"steps": steps, "sanity_images": sanity_images}
    before = replace(job, config=job.config.model_copy(update=changes))
    told = {
        "models": [
            hashlib.sha256(
                b"".join((job.model / n).read_bytes() for n in ("model.safetensors", "model.json"))
            ).hexdigest()
        ],
        "data": ["d", before.split, ROWS, before.piece],
        "config": before.config.model_dump(mode="json", exclude={"sanity"}),
    }
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    assert (fingerprint(before, dataset_digest="d") == name) == found


def test_an_onnx_file_is_attacked_as_the_network_it_was_made_from(job: Job, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weights = np.random.default_rng(0).standard_normal((SIDE * SIDE, 2)).astype(np.float32)
    helper, numbers = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("images", numbers, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", numbers, ["N", 2])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    opset = [helper.make_opsetid("", 17)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)

    found = finished(replace(job, model=path))

    assert found["rows"].tolist() == list(range(ROWS))
    assert "zero_gradient" not in found
    right = [found[key].argmax(1) == found["labels"] for key in ("clean", "square@25.5")]
    assert right[1].sum() < right[0].sum()


def test_the_answers_under_attack_are_those_of_the_decision(job: Job) -> None:
    plain, card = finished(job), read_card(job.model)
    odds = np.log(plain["clean"][:, 1] / plain["clean"][:, 0])
    rate = Rate(right=1, images=2)
    for row in range(ROWS):
        decision = Decision(
            positive="b", threshold=float(probability(odds[row] + 1e-4)), criterion="youden",
            sensitivity=rate, specificity=rate,
        )  # fmt: skip
        write_card(job.model, card.model_copy(update={"decision": decision}))
        (work := job.work.parent / f"work-{row}").mkdir()

        answers = finished(replace(job, work=work))["clean"].argmax(1)

        assert answers.tolist() == (odds > odds[row] + 1e-4).tolist()
