"""Fixtures and settings of all tests: one thread per process, and laws without a deadline."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from array_shards import write_arrays
from hypothesis import HealthCheck, settings
from s3_server import bucket, s3_environment, s3_server, s3_spark

from medspark.shards.schema import SPLITS

__all__ = ["bucket", "s3_environment", "s3_server", "s3_spark"]

if TYPE_CHECKING:  # most tests do not need torch, and its import takes a second
    import torch
    from pyspark.sql import SparkSession
    from torch import Tensor, nn

# Two spinning thread pools on the same cores slow each other tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Every run tries the same examples; --hypothesis-profile explore tries new ones.
settings.register_profile(
    "medspark",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore", settings.get_profile("medspark"), max_examples=500, derandomize=False
)
settings.load_profile("medspark")


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8 x 8 digits: a network trains on them in two seconds."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def train(self, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], epochs: int) -> nn.Module:
        """Return a small network in eval mode; ``loss`` takes (network, images, their rows)."""
        import torch
        from torch import nn

        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(
                *[nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()],
                *[nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()],
                *[nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()],
                *[nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)],
            )
            optimiser = torch.optim.Adam(network.parameters())
            steps = epochs * (len(self.images) // 64)
            rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
            for _ in range(epochs):
                for rows in torch.randperm(len(self.images)).split(64)[: steps // epochs]:
                    optimiser.zero_grad()
                    loss(network, self.images[rows], rows).backward()
                    optimiser.step()
                    rate.step()
        return network.eval()


@pytest.fixture(scope="session", autouse=True)
def home_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give jobs a temporary home for their keys and private lists."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        )
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="module", autouse=True)
def same_draws_in_a_file(request: pytest.FixtureRequest) -> None:
    """Seed what the fixtures of a test file draw, so that no other file decides it."""
    _seed(request.node.nodeid)


@pytest.fixture(autouse=True)
def same_draws_in_a_test(request: pytest.FixtureRequest) -> None:
    """Seed what a test draws: what runs before it does not decide whether it passes."""
    _seed(request.node.nodeid)


def _seed(name: str) -> None:
    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number)


@pytest.fixture(scope="module", autouse=True)
def own_mlflow_stores() -> Iterator[None]:
    """Keep the MLflow stores that one test file chooses from the next file."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, "")  # so that the end restores what was there before
            patch.delenv(name)
        yield
        if "mlflow" in sys.modules:  # most tests do not need it, and its import takes seconds
            import mlflow

            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
            mlflow.set_registry_uri(None)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def digits() -> Digits:
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    return Digits(images[train], labels[train], images[test], labels[test])


@pytest.fixture(scope="session")
def plain_network(digits: Digits) -> nn.Module:
    """A network that never saw an attack."""
    from torch.nn.functional import cross_entropy

    return digits.train(
        lambda network, images, rows: cross_entropy(network(images), digits.labels[rows]), 8
    )


@pytest.fixture(scope="session")
def robust_network(digits: Digits) -> nn.Module:
    """A network trained on attacked images (N-FGSM; de Jorge et al. 2022) at eps 0.2."""
    import torch
    from torch.nn.functional import cross_entropy

    from medspark.attacks.fgsm import fgsm
    from medspark.attacks.threat import ThreatModel
    from medspark.models.classifier import evaluating

    def loss(network: nn.Module, images: Tensor, rows: Tensor) -> Tensor:
        labels = digits.labels[rows]
        noisy = images + 0.4 * (2 * torch.rand_like(images) - 1)
        anywhere = ThreatModel.model_construct(eps=1.0)  # N-FGSM does not project onto the ball
        with evaluating(network):
            attacked = fgsm(network, noisy, labels, threat=anywhere, step=0.2)
        return cross_entropy(network(attacked), labels)

    return digits.train(loss, 8)


@pytest.fixture(scope="session")
def distilled_network(digits: Digits) -> nn.Module:
    """Defensive distillation at temperature 50 (Papernot et al. 2016), deployed at 1."""
    import torch
    from torch.nn.functional import cross_entropy

    teacher = digits.train(
        lambda network, images, rows: cross_entropy(network(images) / 50, digits.labels[rows]), 16
    )
    with torch.no_grad():
        soft = (teacher(digits.images) / 50).softmax(1)
    return digits.train(
        lambda network, images, rows: cross_entropy(network(images) / 50, soft[rows]), 16
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a GPU, and prepare torch for the devices that tests ask for."""
    params = [getattr(item, "callspec", None) and item.callspec.params for item in items]
    devices = [(chosen or {}).get("device") for chosen in params]
    for item, device in zip(items, devices, strict=True):
        if device == "cuda":
            item.add_marker(pytest.mark.gpu)
    for item, chosen in zip(items, params, strict=True):
        if (chosen or {}).get("reader") == "petastorm":
            item.add_marker(pytest.mark.petastorm)
    if "pretended" in devices:
        with suppress(ImportError):  # register it before torch's first backward pass
            importlib.import_module("pretended").register()
    if "cuda" in devices:
        import torch

        if torch.cuda.is_available():
            torch.cuda.init()
    # Tests start more processes than there are GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a missing GPU or Petastorm, with one line of output each."""
    if item.get_closest_marker("petastorm") and (lack := _petastorm_lacks()):
        pytest.skip(lack)
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: this test needs one")


@cache
def _petastorm_lacks() -> str:
    """Return the reason why Petastorm is unusable, or an empty string."""
    from medspark.data.petastorm_import import import_petastorm
    from medspark.errors import UsageError

    try:
        import_petastorm()
    except UsageError as error:
        return str(error)
    return ""


@pytest.fixture(params=["cpu", "pretended", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of a test: the CPU, a pretended device, and a GPU."""
    import torch

    from medspark.train.world import join

    if request.param == "cpu":
        yield torch.device("cpu")
    elif request.param == "pretended":
        with pytest.importorskip("pretended", exc_type=ImportError).pretended_device() as lent:
            yield lent
    else:
        with join(alone=True) as world:
            yield world.device


WriteShards = Callable[..., Path]


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """Return a function that writes a folder of shards and returns it.

    All pixels of row i of a split are (7 i) mod 251, except the first one, which is 255. So an
    image shows its row and its orientation. The label is i mod 2; with ``findings`` it is the
    lowest ``findings`` bits of i.
    """

    def write(
        *, rows: int = 50, shards: int = 3, side: int = 6, bits: int = 8, findings: int = 0
    ) -> Path:
        images = np.empty((rows, side, side, 1), dtype=f"<u{bits // 8}")
        images[:] = (7 * np.arange(rows) % 251)[:, None, None, None]
        images[:, 0, 0] = 255
        labels = np.arange(rows)[:, None] >> np.arange(findings) & 1
        split = images, labels if findings else np.arange(rows) % 2
        splits = dict.fromkeys(SPLITS, split)
        return write_arrays(tmp_path / "shards", splits, shards=shards, rows_per_group=8)

    return write


@pytest.fixture(scope="session")
def load_job() -> Callable[[str], ModuleType]:
    """Return the function that imports the command of a job by its name."""
    return lambda name: importlib.import_module(f"medspark.jobs.{name}")


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """The suite's only Spark session, on two local cores."""
    from medspark.spark.session import SparkConfig, spark_session

    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "2",
        # Queries on a few rows are faster without the optimising compiler.
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.sql.codegen.wholeStage": "false",
    }
    config = SparkConfig(master="local[2]", log_level="ERROR", settings=settings)
    with spark_session(config, name="medspark tests") as session:
        yield session


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the suite's Spark session from the test, as in a new process."""
    from pyspark.sql import SparkSession

    monkeypatch.setattr(SparkSession, "getActiveSession", staticmethod(lambda: None))
