"""Whose folder it is: what medspark did not make is neither written over nor removed."""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark import ownership
from medspark.errors import UsageError
from medspark.ownership import MARKER, apart, check, claim, remove
from medspark.storage import filesystem

KINDS = tuple(ownership._EVIDENCE)
PARTS = ("manifest.json", "data", "model", "run.json", "checkpoints", ".lock", "x.dcm", "staging")
PATHS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join)


@pytest.fixture(params=["here", "in an object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "f") if request.param == "here" else f"memory://{uuid.uuid4().hex}/f"


def write(folder: object, name: str, text: str = "theirs") -> None:
    system, path = filesystem(str(folder))
    system.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
    system.pipe_file(f"{path}/{name}", text.encode())


def names(folder: object) -> set[str]:
    system, path = filesystem(str(folder))
    return {name[len(path) + 1 :] for name in system.find(path)}


@given(kind=st.sampled_from(KINDS), name=PATHS)
def test_a_folder_with_any_file_of_somebody_else_is_refused_and_left_as_it_is(kind, name):
    folder = f"memory://{uuid.uuid4().hex}"
    write(folder, name)

    for decide in (check, claim):
        with pytest.raises(UsageError, match="is not empty and not medspark's"):
            decide(folder, kind)

    assert names(folder) == {name}


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_folder_becomes_ours_and_stays_ours_whatever_is_put_into_it(folder, kind):
    check(folder, kind)
    claim(folder, kind)
    write(folder, "data/theirs.txt")
    claim(folder, kind)

    check(folder, kind)
    assert names(folder) == {MARKER, "data/theirs.txt"}


def test_nothing_is_written_by_looking(folder):
    check(folder, "run")

    assert names(folder) == set()


def test_a_folder_of_another_kind_is_refused(folder):
    claim(folder, "samples")

    with pytest.raises(UsageError, match="holds medspark's samples, not shards"):
        claim(folder, "shards")


EARLIER = {kind: dict(found) for kind, found in ownership._EVIDENCE.items() if found}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, found in EARLIER.items() for name in found]
)
def test_what_an_earlier_version_made_is_ours_and_marked_at_the_next_write(folder, kind, name):
    write(folder, name.replace("*", "0f"), json.dumps(dict.fromkeys(EARLIER[kind][name], 1)))

    check(folder, kind)
    assert MARKER not in names(folder)
    claim(folder, kind)
    assert MARKER in names(folder)


def test_evidence_is_what_the_documents_say():
    from medspark.ingest.sample_set import SamplesManifest
    from medspark.models.card import ModelCard
    from medspark.shards.manifest import Manifest
    from medspark.track.spool import State

    documents = {
        "manifest.json": {"samples": SamplesManifest, "shards": Manifest, "shard cache": Manifest}
        | {"demo data": SamplesManifest},
        "model.json": dict.fromkeys(KINDS, ModelCard),
        "run.json": dict.fromkeys(KINDS, State),
    }
    for kind, found in EARLIER.items():
        for name, keys in found.items():
            assert keys <= set(documents[Path(name).name][kind].model_fields)


@pytest.mark.parametrize("text", ["{", "[]", "null", "7", '{"name": "an app"}', "[" * 100_000])
def test_another_manifest_of_the_same_name_proves_nothing(folder, text):
    write(folder, "manifest.json", text)

    with pytest.raises(UsageError, match=r"manifest\.json is in it"):
        check(folder, "samples")


def test_folders_without_a_file_are_nobodys_but_a_link_is_somebodys(tmp_path):
    (tmp_path / "checkpoints" / "mounted").mkdir(parents=True)
    check(tmp_path, "run")
    (tmp_path / "checkpoints" / "link").symlink_to("/nowhere")

    with pytest.raises(UsageError, match="checkpoints/link is in it"):
        check(tmp_path, "run")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(UsageError, match="is a file"):
        check(tmp_path / "file", "samples")


def test_a_folder_that_cannot_be_looked_into_is_not_taken_for_empty(tmp_path, monkeypatch):
    def refuse(path: object, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)

    with pytest.raises(UsageError, match="cannot be looked into: Permission denied"):
        check(tmp_path, "run")


# --- apart ---

TREE = st.lists(st.sampled_from("ab"), max_size=3).map("/".join)


@given(source=TREE, target=TREE, linked=st.booleans())
def test_source_and_target_are_apart_unless_one_lies_in_the_other(
    tmp_path_factory, source, target, linked
):
    root = tmp_path_factory.mktemp("tree")
    (root / "real" / source).mkdir(parents=True)
    (root / "link").symlink_to("real")
    read = root / ("link" if linked else "real") / source
    written = root / "real" / target
    nested = f"{target}/".lstrip("/").startswith(f"{source}/".lstrip("/")) or (
        f"{source}/".lstrip("/").startswith(f"{target}/".lstrip("/"))
    )

    try:
        apart({"the source": read}, {"the target": written})
    except UsageError:
        assert nested
    else:
        assert not nested


@pytest.mark.parametrize(
    ("source", "target", "fine"),
    [
        ("memory://b/x", "memory://b/x/y", False),
        ("memory://b/x/y", "memory://b/x", False),
        ("memory://b/x", "memory://b/xy", True),
        ("/tmp/x", "memory://tmp/x", True),
        (None, "/tmp/x", True),
    ],
)
def test_addresses_are_told_apart_by_name(source, target, fine):
    try:
        apart({"the source": source}, {"the target": target})
    except UsageError:
        assert not fine
    else:
        assert fine


def test_the_sentence_says_which_lies_in_which(tmp_path):
    with pytest.raises(UsageError, match=r"the run \(.*\) should not lie inside the shards"):
        apart({"the shards": tmp_path}, {"the run": tmp_path / "run"})
    with pytest.raises(UsageError, match=r"the shards \(.*\) should not lie inside the run"):
        apart({"the shards": tmp_path / "shards"}, {"the run": tmp_path})


def test_an_address_that_cannot_be_reached_is_one_sentence():
    for decide in (check, claim):
        with pytest.raises(UsageError, match="nowhere://x cannot be reached"):
            decide("nowhere://x", "samples")


def test_a_link_into_the_middle_of_what_is_read_is_seen(tmp_path):
    (tmp_path / "real" / "deep" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep/x")

    with pytest.raises(UsageError, match="should not lie inside the source"):
        apart({"the source": tmp_path / "real"}, {"the target": tmp_path / "link" / "y"})


def test_a_loop_of_links_is_no_folder_of_anybody(tmp_path):
    (tmp_path / "loop").symlink_to("loop")

    apart({"the source": tmp_path / "loop"}, {"the target": tmp_path / "target"})


def test_a_folder_that_is_known_by_two_names_without_a_link_is_one(tmp_path, monkeypatch):
    (tmp_path / "a" / "below").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(Path, "samefile", lambda one, two: {one.name, two.name} == {"a", "b"})

    with pytest.raises(UsageError, match="should not lie inside"):
        apart({"the source": tmp_path / "a" / "below"}, {"the target": tmp_path / "b"})


# --- remove ---


FOLDERS = st.lists(st.sampled_from(["data", "gone", "a"]), max_size=3).map("/".join)
FILES = st.sampled_from(["0.parquet", "000.parquet", "00.parquet.txt", "x"])


@given(planted=st.sets(st.builds(lambda *parts: "/".join(filter(None, parts)), FOLDERS, FILES)))
def test_only_names_that_are_told_are_removed(planted):
    folder = f"memory://{uuid.uuid4().hex}"
    for name in {*planted, "data/00.parquet", "data/11.parquet"}:
        write(folder, name)

    remove(folder, [r"data/\d\d\.parquet", "gone/y", "a"], keep={"data/11.parquet"})

    assert names(folder) == {*planted, "data/11.parquet"}


def test_folders_that_become_empty_go_and_others_stay(tmp_path):
    for name in ("a/b/1.x", "c/1.x", "c/theirs"):
        write(tmp_path, name)

    remove(tmp_path, ["a/b/1.x", r"c/\d\.x"])

    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {"c", "c/theirs"}


@pytest.mark.parametrize("name", [r"model/model\.json", "model/"])
def test_links_are_never_followed(tmp_path, name):
    write(tmp_path, "elsewhere/model.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")

    remove(tmp_path / "run", [name])

    assert (tmp_path / "elsewhere" / "model.json").exists()


def test_a_whole_tree_is_told_by_a_slash_and_a_file_of_that_name_stays(folder):
    for name in ("x/_temporary/0/1", "y/_temporary"):
        write(folder, name)

    remove(folder, ["[xy]/_temporary/"])

    assert names(folder) == {"y/_temporary"}


def test_a_name_is_matched_whole(tmp_path):
    for name in ("1.x", "1.xy", "21.x"):
        write(tmp_path, name)

    remove(tmp_path, [re.escape("1.x")])

    assert names(tmp_path) == {"1.xy", "21.x"}
