"""Configuration: what a user types is understood, or the key to mend is named."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from medspark.config import Bits, Config, TrainingConfig, dotted_keys, load_config
from medspark.eps import Eps
from medspark.errors import UsageError


class Train(Config):
    """How to train."""

    epochs: int = Field(6, ge=1, description="passes over the data")
    mode: Literal["standard", "fused"] = "fused"


class Job(Config):
    """A job."""

    shards: Path
    eps: Eps = 0.0
    bits: Bits | None = None
    train: Train = Train()


def test_a_key_is_set_by_its_dotted_path():
    config = load_config(Job, ["--shards", "here", "--train.epochs", "9"])

    assert config.shards == Path("here")
    assert config.train == Train(epochs=9)


def test_a_choice_between_numbers_is_understood():
    assert load_config(Job, ["--shards", "x", "--bits", "16"]).bits == 16


def test_argv_overrides_the_profile_which_overrides_the_config(tmp_path: Path):
    (tmp_path / "what.yaml").write_text("shards: a\ntrain: {epochs: 2, mode: standard}\neps: 0.1")
    (tmp_path / "where.yaml").write_text("train: {epochs: 3}\neps: 2/255")
    files = ["--config", str(tmp_path / "what.yaml"), "--profile", str(tmp_path / "where.yaml")]

    config = load_config(Job, [*files, "--eps", "0.2"])

    assert config == Job(shards=Path("a"), eps=0.2, train=Train(epochs=3, mode="standard"))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--train.epohcs", "3"], "There is no key train.epohcs; did you mean train.epochs?"),
        (["--zzz=3"], "There is no key zzz; --help lists them all."),
        ([], "shards is needed: give --shards."),
        (
            ["--shards", "x", "--eps", "3"],
            "eps: the budget is a fraction of [0, 1], at most 64/255",
        ),
        (["--shards", "x", "--eps", "1/0"], "eps cannot be '1/0'"),
        (["--shards", "x", "--bits", "12"], "bits cannot be"),
        (["--shards", "x", "--train.mode", "pgd"], "train.mode cannot be 'pgd'"),
        (["--shards"], "--shards: expected one argument"),
        (["--shards", "x", "stray"], "unrecognized arguments: stray"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(argv: list[str], sentence: str):
    with pytest.raises(UsageError) as caught:
        load_config(Job, argv)

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_in_a_file_is_named_with_its_path(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("shards: a\ntrain: {epohcs: 2}")

    with pytest.raises(UsageError, match=r"train\.epohcs; did you mean train\.epochs\?"):
        load_config(Job, ["--config", str(tmp_path / "c.yaml")])


def test_help_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        load_config(Job, ["--help"], description="What it does.")

    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "What it does." in text
    assert "passes over the data (default: 6)" in text
    for key in dotted_keys(Job):
        assert key.partition(".")[0] in text


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Train().epochs = 3  # type: ignore[misc]


class Mapped(Config):
    """A job with entries of the user's own naming."""

    weights: dict[str, str] = Field({}, description="by network")
    train: Train = Train()


@pytest.mark.parametrize(
    "argv",
    [
        ["--weights.a.b", "/x,y", "--weights.c=/z"],
        ["--weights", '{"a.b": "/x,y"}', "--weights", "c=/z"],
    ],
)
def test_an_entry_of_a_mapping_is_set_by_its_dotted_path(argv: list[str]):
    assert load_config(Mapped, argv).weights == {"a.b": "/x,y", "c": "/z"}


def test_entries_on_the_command_line_join_those_of_the_file(tmp_path: Path):
    (tmp_path / "what.yaml").write_text("weights: {a: x, b: y}")

    config = load_config(Mapped, ["--config", str(tmp_path / "what.yaml"), "--weights.b", "z"])

    assert config.weights == {"a": "x", "b": "z"}


def test_a_mapping_is_not_mistaken_for_a_key_that_begins_alike():
    with pytest.raises(UsageError, match=r"There is no key weight\.a"):
        load_config(Mapped, ["--weight.a", "x"])


class _Runs(Config):
    compare: tuple[str, ...] = ()
    repeats: int = 1


@pytest.mark.parametrize("argv", ["--compare one two --repeats 2", "--compare=one,two --repeats=2"])
def test_the_words_after_a_key_are_a_list(argv: str) -> None:
    found = load_config(_Runs, argv.split())

    assert (found.compare, found.repeats) == (("one", "two"), 2)


def test_two_words_for_a_key_that_takes_one_are_a_mistake() -> None:
    with pytest.raises(UsageError, match="unrecognized arguments: 3"):
        load_config(_Runs, ["--repeats", "2", "3"])


class _Teacher(Config):
    folder: str


class _Taught(Config):
    teacher: _Teacher


def test_a_missing_group_of_keys_is_asked_for_by_the_first_of_them() -> None:
    with pytest.raises(UsageError, match=r"teacher is needed: give --teacher\.folder\."):
        load_config(_Taught, [])


class Reading(TrainingConfig):
    """Settings of which one decides the weights."""

    decides_weights: ClassVar = frozenset({"share"})
    decides_nothing: ClassVar = frozenset({"prefetch"})

    share: float = 1.0
    prefetch: int = 4


class Training(TrainingConfig):
    """Settings that hold others."""

    decides_weights: ClassVar = frozenset({"data", "train"})
    decides_report: ClassVar = frozenset({"images"})

    data: Reading = Reading()
    train: Train = Train()
    images: int = 9


def test_what_decides_the_weights_is_taken_out_of_nested_settings_too():
    chosen = Training().deciding_weights()

    assert chosen == {"data": {"share": 1.0}, "train": {"epochs": 6, "mode": "fused"}}


@pytest.mark.parametrize("declared", [{}, {"decides_weights", "decides_nothing"}])
def test_a_setting_of_a_training_that_is_not_declared_once_is_refused(declared: set[str]):
    body = {"__annotations__": {"depth": int}} | dict.fromkeys(declared, frozenset({"depth"}))

    with pytest.raises(TypeError, match=r"Deep\.depth has to be in exactly one of decides_weights"):
        type("Deep", (Training,), body)


def test_a_setting_stays_as_it_was_declared_where_it_is_inherited():
    class Deep(Training):
        decides_weights: ClassVar = frozenset({"depth"})

        depth: int = 1

    assert Deep().deciding_weights() == Training().deciding_weights() | {"depth": 1}
    assert Deep.decides_report == {"images"}
