"""Untrusted model folders: refused with one sentence, before anything large is read or made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.card import CARD, WEIGHTS, ModelCard, read_card
from medspark.models.checkpoint import describe, load_classifier, save_classifier
from medspark.models.config import ModelConfig, check_weights

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
HOSTILE = [
    ("bits", 12), ("bits", 0), ("bits", 10**9), ("dropout", -0.1), ("dropout", 1.0),
    ("dropout", 7.0), ("channels", 0), ("channels", 65), ("channels", 10**9), ("height", 0),
    ("height", 10**6), ("width", 8193), ("temperature", 0), ("temperature", 1e999),
    ("mean", [0.5, 0.5]), ("mean", []), ("std", [0.0]), ("std", [-1.0]), ("std", [1e999]),
    ("mean", [float("nan")]), ("rendering", {"window": "door"}), ("rendering", {"size": -1}),
    ("rendering", {"colour": 3}), ("rendering", {"x" * 10**5: 1}), ("rendering", []),
    ("classes", ["a"]), ("classes", ["a", "a"]), ("classes", ["", "b"]),
    ("classes", [str(n) for n in range(10_001)]), ("architecture", "r" * 300),
    ("architecture", "hf-hub:stranger/net"), ("architecture", "local-dir:/tmp"),
    ("schema_version", 3), ("schema_version", 0), ("kind", "k\n" * 999), ("kind", 1),
    ("unknown\nkey", 1), ("schema_version", 10**400),
]  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "model"
    network = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    save_classifier(folder, network, describe(network, classes=("a", "b"), height=32, width=32))
    return folder


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "model"))


def _change(folder: Path, key: str, value: Any) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {key: value}))


def _refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as told:
        load_classifier(folder)
    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 1000
    return str(told.value)


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=lambda value: str(value)[:20])
def test_a_card_out_of_range_is_one_sentence(folder: Path, key: str, value: Any) -> None:
    _change(folder, key, value)

    _refusal(folder)


@given(key=st.sampled_from([*ModelCard.model_fields]), value=ANYTHING)
def test_a_card_is_valid_or_refused_whatever_it_holds(kept: Path, key: str, value: Any) -> None:
    whole = (kept / CARD).read_text()
    _change(kept, key, value)
    try:
        read_card(kept)
    except UsageError as refusal:
        assert len(str(refusal).splitlines()) == 1  # noqa: PT017 - not every card is refused
    finally:
        (kept / CARD).write_text(whole)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 2), (64, 10_000)])
def test_the_widest_card_is_still_one(bits: int, channels: int, classes: int) -> None:
    card = ModelCard(
        architecture="x", classes=tuple(map(str, range(classes))), channels=channels, bits=bits,
        height=8192, width=1, mean=(0.5,) * channels, std=(1e-9,) * channels, dropout=0.99,
    )  # fmt: skip

    assert ModelCard.model_validate_json(card.model_dump_json()) == card


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10**5, b"[]", b" " * (1 << 23)])
def test_a_card_that_is_no_document_is_one_sentence(folder: Path, content: bytes) -> None:
    (folder / CARD).write_bytes(content)

    _refusal(folder)


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
@pytest.mark.parametrize("place", ["/dev/zero", "pipe", "folder"])
def test_devices_pipes_and_folders_are_no_model(folder: Path, name: str, place: str) -> None:
    (folder / name).unlink()
    if place == "pipe":
        os.mkfifo(folder / name)
    elif place == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(place)

    _refusal(folder)


def test_weights_of_another_shape_than_the_card_are_refused(folder: Path) -> None:
    _change(folder, "classes", ["a", "b", "c"])

    assert "but the card needs" in _refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_weights_of_another_type_are_refused(folder: Path, dtype: torch.dtype) -> None:
    state = load_file(folder / WEIGHTS)
    first = min(name for name in state if name.endswith("weight"))
    save_file(state | {first: state[first].to(dtype)}, folder / WEIGHTS)

    assert f"{first} has {dtype}" in _refusal(folder)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_weights_with_other_names_are_refused(folder: Path, change: str) -> None:
    state = load_file(folder / WEIGHTS)
    if change == "missing":
        del state[min(state)]
    else:
        state["x" * 10**5] = torch.zeros(1)
    save_file(state, folder / WEIGHTS)

    assert "cannot be loaded" in _refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00", (10**8 + 1).to_bytes(8, "little") + b"{", b"\x02" + bytes(7) + b"[]",
        (10**5).to_bytes(8, "little") + b"[" * 10**5, b"\x01" + bytes(7) + b"3",
    ],
    ids=["empty", "short", "long", "list", "deep", "number"],
)  # fmt: skip
def test_first_weights_that_are_none_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)

    with pytest.raises(UsageError, match="is not a safetensors file") as told:
        check_weights(ModelConfig(weights=str(path)))

    assert len(str(told.value).splitlines()) == 1


def test_first_weights_that_are_a_pipe_or_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")

    for name in ("pipe", "zero"):
        with pytest.raises(UsageError, match="it is no regular file"):
            check_weights(ModelConfig(weights=str(tmp_path / f"{name}.safetensors")))
