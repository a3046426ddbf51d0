# Databricks notebook source
# MAGIC %md
# MAGIC # 02 Train robustly, and compare scales
# MAGIC
# MAGIC An attacker fools a plainly trained network with changes that no radiologist sees. **Adversarial training**
# MAGIC attacks every batch with the current weights before learning from it. medspark's mode `fused_noise`
# MAGIC computes the attack in the backward pass of the training step.
# MAGIC
# MAGIC This notebook trains a plain and a defended network on the shards of notebook 01, on one and on several
# MAGIC processes, and on shares of the data, as **one sweep**: a parent run in MLflow with a child for every
# MAGIC cell. Spark (`TorchDistributor`) starts the processes: on a cluster as one barrier task each, on a
# MAGIC laptop beside the driver. Finished cells are not run again.

# COMMAND ----------

from pathlib import Path

from medspark.workflows.scale_grid import ScaleAtConfig
from medspark.workflows.notebook import open_session, parameters, show
from medspark.workflows.scale_at import scale_at
from medspark.study.scale_plots import figures_of
from medspark.study.sweep import Sweep

chosen = parameters(
    globals().get("dbutils"),
    folder="build/notebooks",
    processes="1,2",
    shares="0.3,1.0",
    model="resnet10t",
    epochs="4",
    repeats="1",
    eps="4/255",
    experiment="medspark",
    tracking_uri="",
)
folder = Path(chosen["folder"])
pictures = folder / "pictures"
spark = open_session()

# COMMAND ----------

# MAGIC %md
# MAGIC ## The sweep
# MAGIC
# MAGIC Every rank has the same number of threads at every scale. Speed is measured after a warm-up, start-up
# MAGIC is reported separately, and a single process without DDP is timed for comparison. The global batch
# MAGIC does not depend on the number of processes, so more processes train the same network in less time.

# COMMAND ----------

config = ScaleAtConfig.model_validate(
    {
        "shards": folder / "shards",
        "folder": folder / "sweep",
        "grid": {
            "processes": chosen["processes"].split(","),
            "data": chosen["shares"].split(","),
            "mode": ("standard", "fused_noise"),
            "plain": len(chosen["processes"].split(",")) > 1,
        },
        "repeats": chosen["repeats"],
        "model": {"name": chosen["model"]},
        "attack": {"eps": chosen["eps"]},
        "train": {"epochs": chosen["epochs"], "lr": 3e-3},
        "track": {"experiment": chosen["experiment"], "uri": chosen["tracking_uri"] or None},
    }
)
result = scale_at(config)
print(result["table"])

# COMMAND ----------

# MAGIC %md
# MAGIC ## The figures
# MAGIC
# MAGIC The figures show speed and efficiency by processes, clean AUROC and worst-case accuracy under attack by
# MAGIC size of the data, and the parts of a cell's start-up.

# COMMAND ----------

sweep = Sweep.model_validate_json((Path(result["report"]).parent / "sweep.json").read_bytes())
for name, figure in figures_of([sweep]).items():
    print(show(figure, name=f"02 {name}", folder=pictures))

# COMMAND ----------

# MAGIC %md
# MAGIC Does the price of robustness shrink with data? These sentences say what the sweep shows. A few hundred
# MAGIC images and one repeat show little; `jobs/scale_at.py` runs the same sweep at any size.

# COMMAND ----------

for sentence in result["sentences"]:
    print(sentence)
print("whole report:", result["report"])
print("MLflow:", result["mlflow"]["uri"], "run", result["mlflow"]["run_id"])

# COMMAND ----------

# MAGIC %md
# MAGIC In MLflow, open the experiment, select the children of the sweep and press *Compare*. All of them have
# MAGIC the parameters `world_size`, `data_share`, `model`, `mode`, `repeat` and the metrics `scale/…` and
# MAGIC `test/…`. Next: **03 Break it and defend it**.
