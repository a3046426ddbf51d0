"""The part of a worker in a round: train some clients, measure and combine some coordinates.

A worker is given a step and the number of its part. It finds everything else in the shared folder,
so any worker can do any part, and doing a part again writes the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from medspark.federate.combining import Combining
from medspark.federate.evaluation import evaluation, own_networks
from medspark.federate.guard import Deadline
from medspark.federate.setting import Setting, Step
from medspark.federate.training import Training

__all__ = ["Worker"]


class Worker:
    """Does parts of steps; it keeps the network and the mapped images between them."""

    def __init__(self, setting: Setting, *, expendable: bool = False) -> None:
        """``expendable``: end this process if a client does not answer before the deadline."""
        self._setting, self._folder = setting, setting.folder
        seconds = setting.config.clients.deadline
        self._training = Training(setting, Deadline(self._folder, seconds) if expendable else None)
        self._combining = Combining(setting)

    def do(self, step: Step, part: int) -> dict[str, Any]:
        """Do one part of ``step`` and return its answer, in the form of JSON."""
        kinds: Mapping[str, Callable[[Step, int], dict[str, Any]]] = {
            "train": self._training.train,
            "forge": self._training.forge,
            "measure": self._combining.measure,
            "combine": self._combining.combine,
            "evaluate": self._evaluate,
            "evaluate_own": self._evaluate_own,
        }
        return kinds[step["kind"]](step, part)

    def _evaluate(self, step: Step, part: int) -> dict[str, Any]:
        job = evaluation(self._setting.shards, step["job"])
        for piece in step["pieces"][part]:
            job.do(piece)
        return {}

    def _evaluate_own(self, step: Step, part: int) -> dict[str, Any]:
        job = evaluation(self._setting.shards, step["job"])
        clients = {client: step["clients"][client] for client in step["groups"][part]}
        for own in own_networks(self._folder, job, clients):
            own.work.mkdir(parents=True, exist_ok=True)
            own.do(0)
        return {}
