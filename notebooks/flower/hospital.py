"""A hospital in a Flower federation: it trains on its own shards, and only weights leave it.

This needs flwr 1.41, torch, timm, pyarrow, pydantic-settings and PyYAML, with medspark on
PYTHONPATH; of medspark it uses federate, train, attacks, evaluate, data, models and shards, and no
Spark. One server and two hospitals on one machine, each line in a terminal of its own; between
machines leave out --insecure and give certificates, as Flower's documentation says:

    flower-superlink --insecure --disable-runtime-dependency-installation
    flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9094 \
        --node-config "shards='/data/hospital-1/shards'"
    flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9095 \
        --node-config "shards='/data/hospital-2/shards'"
    flwr run notebooks/flower here --stream

where ~/.flwr/config.toml has [superlink.here] with address = "127.0.0.1:8000" and insecure = true.
"""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from medspark.data.native import MappedSplit
from medspark.federate.client import Task, train_client
from medspark.federate.local import LocalConfig
from medspark.models.backbones import build
from medspark.models.config import ModelConfig
from medspark.shards.manifest import read_manifest

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a round on this hospital's images."""
    asked = message.content["config"]
    shards = Path(str(context.node_config["shards"]))
    manifest = read_manifest(shards)
    torch.manual_seed(0)
    model = build(
        ModelConfig(name=asked["model"]),
        num_classes=len(manifest.classes),
        channels=manifest.channels,
    )

    answer = train_client(
        model,
        MappedSplit(shards, manifest, "train"),
        Task(
            message.content["arrays"]["weights"].numpy(),
            round=asked["server-round"] - 1,
            seed=asked["seed"],
            rounds=asked["rounds"],
        ),
        LocalConfig.model_validate_json(asked["local"]),
    )

    print(f"{answer.images} images, {answer.steps} steps, mean loss {answer.loss:.4f}", flush=True)
    content = {
        "arrays": ArrayRecord({"weights": Array(answer.weights)}),
        "metrics": MetricRecord({"num-examples": answer.images, "loss": answer.loss}),
    }
    return Message(content=RecordDict(content), reply_to=message)
