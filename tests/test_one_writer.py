"""One writer at a time, whether the file system has locks or not."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from medspark import lock, storage
from medspark.errors import RunError, UsageError
from medspark.lock import LEASE, LOCK, locked

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def fail_with(code: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(code, "what the kernel says")

    return flock


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, and leases that are quick."""
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.ENOTSUP))
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.01)


def lease_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / LEASE).read_text()))


def _hold(folder: str, ready: object, for_ever: object) -> None:
    with locked(folder):
        ready.set()  # type: ignore[attr-defined]
        for_ever.wait()  # type: ignore[attr-defined]


def test_the_second_writer_is_told_who_has_it_and_a_killed_one_is_not_in_the_way(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, for_ever = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(str(tmp_path), ready, for_ever))
    first.start()
    assert ready.wait(60)
    by = f"process {first.pid} on {re.escape(socket.gethostname())} since " + r"\d{4}-\d\d-\d\d "

    with pytest.raises(UsageError, match=by), locked(tmp_path):
        pass
    first.kill()
    first.join()

    with locked(tmp_path):
        pass


def test_a_folder_is_free_again_after_its_writer_even_one_that_failed(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError
    assert not (tmp_path / LEASE).exists()


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EWOULDBLOCK])
def test_a_held_lock_is_no_missing_one(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", fail_with(code))

    with pytest.raises(UsageError, match="Another job is writing"), locked(tmp_path):
        pass
    assert not (tmp_path / LEASE).exists()


@pytest.mark.parametrize("code", NO_LOCKS)
def test_where_there_are_no_locks_a_lease_holds_the_folder(tmp_path, monkeypatch, leases, code):
    monkeypatch.setattr(fcntl, "flock", fail_with(code))

    with locked(tmp_path):
        assert lease_of(tmp_path)["host"] == socket.gethostname()
        with pytest.raises(UsageError, match="its lease ends"), locked(tmp_path):
            pass
    assert not (tmp_path / LEASE).exists()


def test_another_error_of_the_file_system_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.EIO))

    with (
        pytest.raises(UsageError, match="cannot be locked: what the kernel says"),
        locked(tmp_path),
    ):
        pass


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / LOCK).symlink_to(tmp_path / "theirs")

    with pytest.raises(UsageError, match="cannot be locked"), locked(tmp_path):
        pass
    assert (tmp_path / "theirs").read_text() == "theirs"


@pytest.mark.parametrize("left", ['{"expires": 1, "host": "gone"}', "{", "[]", ""])
def test_a_lease_that_has_run_out_or_says_nothing_is_taken_over(tmp_path, leases, left):
    (tmp_path / LEASE).write_text(left)

    with locked(tmp_path):
        assert lease_of(tmp_path)["host"] == socket.gethostname()


def test_a_lease_is_renewed_while_the_work_goes_on(tmp_path, monkeypatch, leases):
    monkeypatch.setattr(lock, "_LEASE_SECONDS", 0.4)

    with locked(tmp_path):
        first = lease_of(tmp_path)["expires"]
        for _ in range(1000):
            if lease_of(tmp_path)["expires"] != first:
                break
            lock.time.sleep(0.01)
        assert lease_of(tmp_path)["expires"] > first


def test_a_writer_whose_lease_was_taken_over_fails_and_leaves_the_new_one(tmp_path, leases):
    with pytest.raises(RunError, match="was taken over"), locked(tmp_path):
        (tmp_path / LEASE).write_text('{"token": "another", "host": "there"}')

    assert lease_of(tmp_path)["host"] == "there"


def test_object_stores_have_leases_too(monkeypatch):
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.01)
    folder = f"memory://{uuid.uuid4().hex}"

    with locked(folder), pytest.raises(UsageError, match="its lease ends"), locked(folder):
        pass
    with locked(folder):
        pass


def _take(folder: str, environment: dict[str, str], begin: object, won: object) -> None:
    os.environ.update(environment)
    begin.wait()  # type: ignore[attr-defined]
    try:
        with locked(folder):
            won.put(os.getpid())  # type: ignore[attr-defined]
            time.sleep(3)
    except UsageError as error:
        won.put(str(error))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_of_processes_that_take_a_folder_of_a_store_at_once_one_gets_it(bucket, s3_environment):
    context = multiprocessing.get_context("spawn")
    begin, won = context.Event(), context.Queue()
    args = (f"{bucket}/x", s3_environment, begin, won)
    processes = [context.Process(target=_take, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    time.sleep(2)
    begin.set()

    said = [won.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)

    assert sorted(isinstance(each, int) for each in said) == [False, False, True]
    assert all("Another job is writing" in each for each in said if isinstance(each, str))


def test_a_lease_of_a_store_is_given_back(bucket):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(f"{bucket}/x"):
            raise ZeroDivisionError


def test_a_killed_writers_lease_of_a_store_is_taken_over_when_it_has_run_out(bucket):
    left = {"token": "killed", "process": 1, "host": "gone", "since": "then"}
    storage.write_text(f"{bucket}/x/{LEASE}", json.dumps(left | {"expires": time.time() + 60}))
    with pytest.raises(UsageError, match="process 1 on gone since then; its lease ends"):
        locked(f"{bucket}/x").__enter__()

    storage.write_text(f"{bucket}/x/{LEASE}", json.dumps(left | {"expires": time.time() - 1}))
    with locked(f"{bucket}/x") as is_held:
        assert is_held()


def test_a_writer_of_a_store_whose_lease_was_taken_over_knows_it_and_leaves_the_new_one(bucket):
    theirs = '{"token": "another", "host": "there"}'

    with pytest.raises(RunError, match="was taken over"), locked(f"{bucket}/x") as is_held:
        storage.write_text(f"{bucket}/x/{LEASE}", theirs)
        assert not is_held()

    assert storage.read_text(f"{bucket}/x/{LEASE}") == theirs


def test_a_lease_of_a_store_is_renewed_over_itself_only(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_LEASE_SECONDS", 0.4)

    with locked(f"{bucket}/x") as is_held:
        first = storage.read_text(f"{bucket}/x/{LEASE}")
        for _ in range(1000):
            if storage.read_text(f"{bucket}/x/{LEASE}") != first:
                break
            time.sleep(0.01)
        assert storage.read_text(f"{bucket}/x/{LEASE}") != first
        assert is_held()


def test_a_store_that_does_not_answer_ends_no_work_that_renews_its_lease_later(
    bucket, monkeypatch, caplog
):
    monkeypatch.setattr(lock, "_LEASE_SECONDS", 0.2)
    real, failures = storage.write_if, iter([True, True])

    with locked(f"{bucket}/x"):

        def write_if(*args: object) -> object:
            if next(failures, False):
                raise RunError("the store does not answer.")
            return real(*args)

        monkeypatch.setattr(storage, "write_if", write_if)
        time.sleep(0.5)

    assert "was not renewed: the store does not answer." in caplog.text
