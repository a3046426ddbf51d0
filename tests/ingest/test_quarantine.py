"""The private quarantine list: complete over runs, readable by its owner only, replaceable."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.images.deidentify import Privacy
from medspark.ingest.quarantine import QuarantineList

KEYS = st.sampled_from("abcdef")
PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1)
RUNS = st.lists(st.dictionaries(KEYS, st.none() | PATHS), max_size=4)


def read(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["file_key"]: row["path"] for row in csv.DictReader(file)}


def rows(told: dict[str, str | None]) -> list[tuple[str, str | None, str, str]]:
    return [(key, path, "truncated", "m") for key, path in told.items()]


@given(runs=RUNS, known=st.dictionaries(KEYS, PATHS))
def test_a_run_tells_which_files_are_listed_and_the_list_remembers_where_they_are(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[dict[str, str | None]],
    known: dict[str, str],
) -> None:
    listed = QuarantineList(tmp_path_factory.mktemp("list") / "deep" / "list.csv")
    remembered: dict[str, str] = {}
    for told in runs:
        before = known | remembered
        remembered = {k: p or before[k] for k, p in told.items() if p or k in before}

        missing = listed.update(rows(told), known=known.items())

        assert (read(listed.path) if listed.path.exists() else {}) == remembered
        assert missing == len(told) - len(remembered)


def test_the_list_is_for_its_owner_alone_whoever_could_read_the_one_before(tmp_path: Path) -> None:
    listed = QuarantineList(tmp_path / "new" / "list.csv")
    for _ in range(2):
        listed.update(rows({"a": "/in/x"}))

        assert stat.S_IMODE(listed.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(listed.path.parent.stat().st_mode) == 0o700
        assert [path.name for path in listed.path.parent.iterdir()] == ["list.csv"]
        listed.path.chmod(0o644)


def test_a_dataset_without_a_quarantine_needs_no_list(tmp_path: Path) -> None:
    listed = QuarantineList(tmp_path / "list.csv")

    assert listed.renewed([], known=()) is None
    assert not listed.path.exists()
    listed.update(rows({"a": "/in/x"}))
    listed.update([])
    assert read(listed.path) == {}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a,b\n1,2\n", b'"', b""])
def test_a_damaged_list_is_made_anew(tmp_path: Path, content: bytes) -> None:
    listed = QuarantineList(tmp_path / "list.csv")
    listed.path.write_bytes(content)

    assert listed.update(rows({"a": "/in/x", "b": None})) == 1
    assert read(listed.path) == {"a": "/in/x"}


def test_what_is_missing_or_cannot_be_listed_is_said_and_costs_nothing(
    tmp_path: Path, caplog
) -> None:
    (tmp_path / "file").touch()

    assert QuarantineList(tmp_path / "file" / "l.csv").renewed(rows({"a": "/x"}), known=()) is None
    assert "are not listed" in caplog.text
    found = QuarantineList(tmp_path / "l.csv").renewed(rows({"a": "/x", "b": None}), known=())
    assert found == str(tmp_path / "l.csv")
    assert f"1 quarantined files are missing from {found}" in caplog.text


@pytest.mark.parametrize("place", ["samples/list.csv", "in/deep/list.csv", "link/list.csv"])
def test_a_list_in_the_dataset_or_the_archive_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "samples")
    privacy = Privacy(quarantine_file=tmp_path / place)

    with pytest.raises(UsageError, match="quarantine_file"):
        QuarantineList.of(privacy, dataset=f"{tmp_path}/samples", source=f"{tmp_path}/in")


def test_each_dataset_has_a_list_of_its_own_beside_the_keys(home_of_tests: Path) -> None:
    one, two = (
        QuarantineList.of(Privacy(), dataset=name, source="/in").path for name in ("/a", "/b")
    )

    assert one != two
    assert one.parent == two.parent == home_of_tests / ".medspark" / "quarantine"
