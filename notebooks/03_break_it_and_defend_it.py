# Databricks notebook source
# MAGIC %md
# MAGIC # 03 Break it, and defend it
# MAGIC
# MAGIC Notebook 02 trained a plain and a defended network. This notebook attacks both on images of the test
# MAGIC split. It shows the attacker's change, where the networks look before and after it, and how accuracy
# MAGIC falls with the attacker's budget `eps` (a fraction of [0, 1], after windowing).

# COMMAND ----------

from pathlib import Path

import torch

from medspark.attacks.threat import ThreatModel
from medspark.data.native import MappedSplit
from medspark.eps import eps_text
from medspark.evaluate.gallery import exhibits, typical_rows
from medspark.evaluate.plots import accuracy_curves, image_grid
from medspark.evaluate.robust import evaluate
from medspark.evaluate.config import AttackSettings
from medspark.workflows.notebook import parameters, show
from medspark.models.checkpoint import load_classifier
from medspark.shards.manifest import read_manifest
from medspark.study.sweep import Sweep

chosen = parameters(
    globals().get("dbutils"), folder="build/notebooks", eps="4/255", images="128", steps="10"
)
folder = Path(chosen["folder"])
pictures = folder / "pictures"
threat = ThreatModel.model_validate({"eps": chosen["eps"]})

# COMMAND ----------

# MAGIC %md
# MAGIC ## The two networks
# MAGIC
# MAGIC The sweep's report lists every cell. This loads the plain and the defended cell with the most data.
# MAGIC Weights are safetensors: loading a model runs no code.

# COMMAND ----------

sweep = Sweep.model_validate_json((folder / "sweep" / "report" / "sweep.json").read_bytes())
judged = [measured for measured in sweep.finished if not measured.timed_only]
cells = sorted((m.point.data_share, m.point.mode, m.fingerprint) for m in judged)
places = {mode: folder / "sweep" / "cells" / name / "model" for _, mode, name in cells}
networks = {mode: load_classifier(place) for mode, place in places.items()}
for mode, place in places.items():
    print(f"{mode:>12}: {place}")

# COMMAND ----------

# MAGIC %md
# MAGIC ## One image at a time
# MAGIC
# MAGIC From left to right: the image, where the network looks, the attacker's change (amplified), the attacked
# MAGIC image, and where the network looks after the attack. The change is invisible, but the plain network's
# MAGIC prediction changes.

# COMMAND ----------

manifest = read_manifest(folder / "shards")
split = MappedSplit(folder / "shards", manifest, "test")
images, truth = split.tensors(typical_rows(split.labels, 3))
for mode, network in networks.items():
    shown = exhibits(network, images, truth, threat=threat, steps=int(chosen["steps"]))
    grid = image_grid(shown, classes=manifest.classes, eps=threat.eps)
    print(show(grid, name=f"03 attacked {mode}", folder=pictures))

# COMMAND ----------

# MAGIC %md
# MAGIC ## All images
# MAGIC
# MAGIC FGSM takes one step; PGD takes many steps and is stronger. The worst case counts an image as wrong if
# MAGIC any attack fooled the network. The report flags results you should not trust: an attack that fails
# MAGIC because gradients vanish proves nothing.

# COMMAND ----------

budgets = tuple(share * threat.eps for share in (0.25, 0.5, 1.0))
settings = AttackSettings(
    attacks=("fgsm", "pgd"),
    eps=budgets,
    steps=int(chosen["steps"]),
    images=int(chosen["images"]),
)
rows = settings.rows(len(split))
batch = (*split.tensors(rows), torch.from_numpy(rows))
for mode, network in networks.items():
    result = evaluate(network, [batch], settings, probed_below=settings.probed_below(rows))
    print(show(accuracy_curves(result), name=f"03 accuracy {mode}", folder=pictures))
    worst = result.worst_case[-1]
    print(
        f"{mode:>12}: clean {result.clean.accuracy:.1%}, worst case at {eps_text(threat.eps)} "
        f"{worst.accuracy:.1%}, believable: {result.believable}"
    )

# COMMAND ----------

# MAGIC %md
# MAGIC `jobs/evaluate.py` runs every attack of medspark on the executors, and reports confidence intervals by
# MAGIC patient.
