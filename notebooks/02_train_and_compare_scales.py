# Databricks notebook source
# MAGIC %md
# MAGIC # 02 Train robustly, and compare scales
# MAGIC
# MAGIC A network that was trained as usual is fooled by changes that no radiologist can see. **Adversarial
# MAGIC training** attacks every batch before learning from it, with the weights as they are at that moment.
# MAGIC medspark takes the attack from a backward pass that is needed anyway (`fused_noise`).
# MAGIC
# MAGIC This notebook trains a plain and a defended network on the shards of notebook 01, on one and on several
# MAGIC processes, and on shares of the data, as **one sweep**: a parent run in MLflow with a child for every
# MAGIC cell. The processes are started by Spark (`TorchDistributor`): on a cluster one barrier task each, on a
# MAGIC laptop beside the driver. Cells that are done are not run again.

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
# MAGIC Every rank has the same number of threads at every scale, speed is taken after a warm-up, start-up is
# MAGIC told apart, and a single process without DDP is timed beside them. The global batch of a step does not
# MAGIC depend on the number of processes, so more of them train the same network, only sooner.

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
# MAGIC ## What it looks like
# MAGIC
# MAGIC Throughput and efficiency over the processes; clean AUROC and worst-case accuracy under attack over the
# MAGIC size of the data; and what the start-up of a cell is made of.

# COMMAND ----------

sweep = Sweep.model_validate_json((Path(result["report"]).parent / "sweep.json").read_bytes())
for name, figure in figures_of([sweep]).items():
    print(show(figure, name=f"02 {name}", folder=pictures))

# COMMAND ----------

# MAGIC %md
# MAGIC Does the price of robustness shrink with data? What this sweep says (a few hundred images and one
# MAGIC repeat say little; `jobs/scale_at.py` does the same at any size):

# COMMAND ----------

for sentence in result["sentences"]:
    print(sentence)
print("whole report:", result["report"])
print("MLflow:", result["mlflow"]["uri"], "run", result["mlflow"]["run_id"])

# COMMAND ----------

# MAGIC %md
# MAGIC In the MLflow page open the experiment, select the children of the sweep and press *Compare*: they have
# MAGIC the parameters `world_size`, `data_share`, `model`, `mode`, `repeat` and the metrics `scale/…` and
# MAGIC `test/…` in common. Next: **03 Break it and defend it**.
