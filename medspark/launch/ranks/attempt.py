"""Launch the ranks once through TorchDistributor, watch them, and end them if they hang."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
from pyspark.sql import SparkSession

from medspark.files import write_whole
from medspark.launch.ranks.process_mark import belongs
from medspark.launch.ranks.rank import NONCE, Order
from medspark.launch.ranks.reports import Failure, Reports, diagnose
from medspark.launch.ranks.torchrun import WRAPPER, QuietDistributor
from medspark.launch.ranks.trampoline import trampoline
from medspark.spark.cluster import end_jobs, tag_jobs

__all__ = ["Attempt", "Interrupted"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
# If the ranks have ended but the job that started them has not, end the job after this time.
_GRACE_SECONDS = 10.0
_CANCEL_SECONDS = 60.0
# Time for killed ranks to write their reports.
_LAST_WORDS_SECONDS = 2.0


class Interrupted(Exception):  # noqa: N818 - not an error: the supervisor requested it
    """The supervisor ended the attempt."""


class Attempt:
    """The ranks of one launch, either Spark tasks or processes of this machine."""

    def __init__(
        self,
        spark: SparkSession,
        order: Order,
        *,
        package: bytes,
        processes: int,
        on_executors: bool,
        gpu: bool,
    ) -> None:
        self.reports = Reports(order.folder)
        self._spark = spark
        self._order = order
        self._package = package
        self._processes = processes
        self._on_executors = on_executors
        self._gpu = gpu
        self._tag = f"medspark-{order.nonce}"
        self._error: BaseException | None = None
        self.launched_at = 0.0

    def run(
        self, *, start_seconds: float, interrupt: Callable[[], bool]
    ) -> dict[str, Any] | Failure:
        """Return rank 0's return value, or the Failure.

        Raises Interrupted once ``interrupt``, which is polled, returns true.
        """
        write_whole(self._order.folder / NONCE, self._order.nonce)
        self.launched_at = time.time()
        thread = threading.Thread(target=self._launch, name="ranks", daemon=True)
        thread.start()
        try:
            self._watch(thread, start_seconds, interrupt)
        except BaseException:  # also after Ctrl-C: no rank outlives this process
            self._cancel(thread)
            raise
        return self._outcome()

    def _launch(self) -> None:
        try:
            if self._on_executors:
                tag_jobs(self._spark, self._tag)
            distributor = QuietDistributor(
                num_processes=self._processes,
                local_mode=not self._on_executors,
                use_gpu=self._gpu,
            )
            order = self._order
            distributor.start(order, trampoline(), self._package, order.model_dump(mode="json"))
        except Exception as error:  # noqa: BLE001 - passed to the watching thread
            self._error = error

    def _watch(
        self, thread: threading.Thread, start_seconds: float, interrupt: Callable[[], bool]
    ) -> None:
        begun, over_since = time.monotonic(), None
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            now = time.monotonic()
            if over_since is None and self._is_over():
                over_since = now
            if over_since is not None and now - over_since > _GRACE_SECONDS:
                # A torchrun agent that lost another agent waits 300 s in torch's exit barrier.
                self._cancel(thread)
            elif now - begun > start_seconds and len(self.reports.started()) < self._processes:
                self._cancel(thread)
            elif over_since is None and interrupt():
                raise Interrupted

    def _is_over(self) -> bool:
        ended = self.reports.ended()
        return len(ended) == self._processes or any(end.kind != "ok" for end in ended.values())

    def _cancel(self, thread: threading.Thread) -> None:
        if self._on_executors:
            end_jobs(self._spark, self._tag)
        else:
            _end_local_ranks(self._order.mark)
        thread.join(_CANCEL_SECONDS)
        if thread.is_alive():
            logger.warning("the ranks' job did not end within %d s", _CANCEL_SECONDS)

    def _outcome(self) -> dict[str, Any] | Failure:
        # Only rank 0's result file counts: TorchDistributor returns normally after failures too.
        if self.reports.result.exists():
            return dict(json.loads(self.reports.result.read_text(encoding="utf-8")))
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while len(self.reports.ended()) < self._processes and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        failure = diagnose(self.reports, self._processes, self._error)
        self.reports.end_leftovers()
        return failure


def new_nonce() -> str:
    """Return a random word by which ranks recognise the driver's folder."""
    return uuid.uuid4().hex


def _end_local_ranks(mark: str) -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if belongs(process, mark) and WRAPPER in process.cmdline():
                process.terminate()
