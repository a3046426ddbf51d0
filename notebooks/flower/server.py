"""The server of the federation in ``hospital.py``: Flower's FedAvg over medspark's weights."""

from __future__ import annotations

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from medspark.federate.local import LocalConfig
from medspark.federate.weights import pack, unpack
from medspark.models.backbones import build
from medspark.models.config import ModelConfig

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and write the network's weights with timm's names."""
    run = context.run_config
    policy = LocalConfig.model_validate_json(run["local"]).batch_norm
    torch.manual_seed(run["seed"])
    model = build(
        ModelConfig(name=run["model"]), num_classes=run["classes"], channels=run["channels"]
    )
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=run["hospitals"],
        min_available_nodes=run["hospitals"],
    )

    result = strategy.start(
        grid,
        ArrayRecord({"weights": Array(pack(model, policy))}),
        num_rounds=run["rounds"],
        train_config=ConfigRecord(
            {name: run[name] for name in ("model", "seed", "local", "rounds")}
        ),
    )

    unpack(model, result.arrays["weights"].numpy(), policy)
    save_file(model.backbone.state_dict(), run["output"])
    for number, figures in result.train_metrics_clientapp.items():
        print(f"round {number}: mean loss {figures['loss']:.4f}", flush=True)
