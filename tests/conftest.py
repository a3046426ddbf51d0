"""What every test shares: one thread a process, and laws that are tried without a stopwatch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings

from medspark.shards.manifest import Manifest, Shard, Split, digest_of, sha256_of, write_manifest
from medspark.shards.schema import PixelFormat, write_shard

if TYPE_CHECKING:  # most tests do without torch, and its import takes a second
    from pyspark.sql import SparkSession
    from torch import Tensor, nn

# Two spinning thread pools on the same cores slow each other tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "medspark", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("medspark")


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8 x 8 digits: small enough to train a network on in two seconds."""

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
        anywhere = ThreatModel(eps=1.0)  # N-FGSM does not project onto the ball
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


WriteShards = Callable[..., Path]


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """Return a function that writes a folder of shards and returns it.

    The pixels of row i of a split are all (7 i) mod 251 but for the first, which is 255, so that
    an image tells its row and its orientation. The label is i mod 2.
    """

    def write(*, rows: int = 50, shards: int = 3, side: int = 6, bits: int = 8) -> Path:
        pixel_format = PixelFormat(side, side, 1, bits)
        (tmp_path / "data").mkdir()
        splits = {name: _split(tmp_path, name, rows, shards, pixel_format) for name in _SPLITS}
        write_manifest(
            tmp_path,
            Manifest(
                digest=digest_of(splits),
                generation="0",
                classes=("a", "b"),
                height=side,
                width=side,
                channels=1,
                bits=bits,
                seed=0,
                splits=splits,
                leak_check={},
                source={},
            ),
        )
        return tmp_path

    return write


_SPLITS = ("train", "val", "test")


def _split(folder: Path, name: str, rows: int, shards: int, pixel_format: PixelFormat) -> Split:
    images = np.empty((rows, *pixel_format.shape), dtype=pixel_format.dtype)
    images[:] = (7 * np.arange(rows) % 251)[:, None, None, None]
    images[:, 0, 0] = 255
    labels = np.arange(rows) % 2
    written = []
    for number, part in enumerate(np.array_split(np.arange(rows), shards)):
        path = f"data/{name}-{number:05d}.parquet"
        names = [f"{name}-{row}" for row in part]
        pixels = pa.array([images[row].tobytes() for row in part], pa.binary(pixel_format.nbytes))
        columns = [names, names, pa.array(labels[part], pa.int32()), pixels]
        table = pa.table(columns, schema=pixel_format.schema)
        count = write_shard(folder / path, [table], pixel_format, rows_per_group=8)
        size = (folder / path).stat().st_size
        written.append(Shard(path=path, rows=count, bytes=size, sha256=sha256_of(folder / path)))
    counts = tuple(int(n) for n in np.bincount(labels, minlength=2))
    return Split(rows=rows, patients=rows, class_counts=counts, shards=tuple(written))


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """The one Spark session of the suite: two local cores, nothing written but below tests."""
    from medspark.ingest.session import SparkConfig, spark_session

    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "2",
        # Queries of a few rows never earn back what compiling them twice costs.
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.sql.codegen.wholeStage": "false",
    }
    config = SparkConfig(master="local[2]", log_level="ERROR", settings=settings)
    with spark_session(config, name="medspark tests") as session:
        yield session


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test see no Spark session, as in a process of its own, although the suite has one."""
    from pyspark.sql import SparkSession

    monkeypatch.setattr(SparkSession, "getActiveSession", staticmethod(lambda: None))
