"""Small files of strangers: read within limits, and parsed or refused in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from medspark.config import Config, load_config
from medspark.documents import parse_json, read_regular
from medspark.errors import UsageError
from medspark.yaml_documents import parse_yaml

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
DOCUMENTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)
# What PyYAML itself stumbles over.
TRAPS = (
    b"\xff\xfe\xfa", b"a: \x00", b"[" * 5000, b"{a: " * 5000, b"- " * 3000 + b"x", b"&a [*a]",
    b"a: &a\n  b: *a", b"!!int ''", b"!!bool maybe", b"!!timestamp never", b"2024-13-45",
    b"!!python/object/apply:os.system [ls]", b"9" * 6000, b"? [a]\n: b", b"a: 'b", b"*a", b"%",
)  # fmt: skip


class Job(Config):
    """A job."""

    name: str = ""
    settings: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it


def _bomb(levels: int, times: int) -> bytes:
    lines = [f"l0: &l0 [{', '.join(['x'] * times)}]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * times)}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


@given(DOCUMENTS)
def test_what_was_written_as_yaml_comes_back(document: object) -> None:
    assert parse_yaml(yaml.safe_dump(document).encode()) == document


@given(st.binary(max_size=60) | st.text("[]{}&*!?:- ab'\"\n|>%@0.", max_size=60).map(str.encode))
def test_any_bytes_are_yaml_or_refused(content: bytes) -> None:
    try:
        parse_yaml(content)
    except ValueError as error:
        assert str(error)  # noqa: PT017 - some bytes are YAML


@pytest.mark.parametrize("content", [*TRAPS, _bomb(9, 9), _bomb(20, 2), _bomb(40, 1)])
def test_a_configuration_that_is_a_trap_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)

    with pytest.raises(UsageError) as told:
        load_config(Job, ["--config", str(path)])

    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize(("levels", "times", "fits"), [(4, 9, True), (9, 9, False), (20, 2, False)])
def test_an_alias_counts_as_many_values_as_it_repeats(levels: int, times: int, fits: bool) -> None:
    if fits:
        assert parse_yaml(_bomb(levels, times))
    else:
        with pytest.raises(ValueError, match="more than 100000 values"):
            parse_yaml(_bomb(levels, times))


def test_a_configuration_of_any_size_is_read_to_its_limit_only() -> None:
    with pytest.raises(UsageError, match="/dev/zero is larger than"):
        load_config(Job, ["--config", "/dev/zero"])


def test_aliases_may_repeat_what_is_small() -> None:
    assert parse_yaml(b"a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2},
    }  # fmt: skip


@pytest.mark.parametrize(("levels", "fits"), [(31, True), (32, False)])
def test_thirty_two_levels_are_the_most(levels: int, fits: bool) -> None:
    content = b"[" * levels + b"1" + b"]" * levels
    if fits:
        assert parse_yaml(content)
    else:
        with pytest.raises(ValueError, match="more than 32 levels"):
            parse_yaml(content)


def test_a_line_that_is_no_yaml_is_not_quoted() -> None:
    with pytest.raises(ValueError, match=r"in line 2, column \d+") as told:
        parse_yaml(b"a: 1\npassword: 'hunter2")

    assert "hunter2" not in str(told.value)


def test_a_regular_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")

    assert read_regular(path, most=5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(path, most=4)


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError):  # noqa: PT011 - a folder has a message of its own
            read_regular(path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "{", b"\xff"])
def test_json_that_is_none_or_too_deep_is_a_value_error(content: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the parser's own words
        parse_json(content)
