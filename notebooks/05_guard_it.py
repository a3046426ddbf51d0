# Databricks notebook source
# MAGIC %md
# MAGIC # 05 Guard it
# MAGIC
# MAGIC A guard leaves the network as it is. It cleans the image before the network sees it, or says how
# MAGIC suspicious the image is. This notebook trains a plain network, puts a denoiser before it, fits every
# MAGIC detector of medspark, and looks at one image through all of them: clean, attacked by somebody who does
# MAGIC not know the detectors, and attacked by somebody who does.

# COMMAND ----------

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from medspark.attacks.pgd import pgd
from medspark.attacks.threat import ThreatModel
from medspark.data.native import MappedSplit
from medspark.defend.detect.adaptive import Target, adaptive_attacks
from medspark.defend.detect.config import AdaptiveSettings
from medspark.defend.detect.detector import Training
from medspark.defend.detect.extract import Extractor
from medspark.defend.detect.features import EMBEDDING, PENULTIMATE, find_layers
from medspark.defend.detect.gather import features_of, gather
from medspark.defend.detect.guard import Guard
from medspark.defend.detect.registry import DETECTORS, grid, layers_of
from medspark.eps import eps_text
from medspark.evaluate.config import AttackSettings
from medspark.models.checkpoint import load_classifier
from medspark.shards.manifest import read_manifest
from medspark.workflows.denoise import DenoiseAtConfig, denoise
from medspark.workflows.notebook import contact_sheet, open_session, parameters, show
from medspark.workflows.train_at import TrainAtConfig, train_at

chosen = parameters(
    globals().get("dbutils"),
    folder="build/notebooks",
    model="resnet10t",
    eps="4/255",
    images="32",
    steps="10",
    plain_epochs="20",
    epochs="4",
    tracking_uri="",
)
folder = Path(chosen["folder"])
pictures = folder / "pictures"
threat = ThreatModel.model_validate({"eps": chosen["eps"]})
spark = open_session()

# COMMAND ----------

# MAGIC %md
# MAGIC ## A plain network
# MAGIC
# MAGIC Detectors learn from images that the network gets right, at least two of each class. The networks of
# MAGIC notebook 02 have seen their images too few times for that.

# COMMAND ----------

plain = train_at(
    TrainAtConfig.model_validate(
        {
            "shards": folder / "shards",
            "run_dir": folder / "plain",
            "resume": "auto",
            "model": {"name": chosen["model"]},
            "attack": {"eps": chosen["eps"]},
            "train": {
                "mode": "standard",
                "epochs": chosen["plain_epochs"],
                "lr": 3e-3,
                "validation_steps": 2,
            },
            "evaluate": {"eps": [chosen["eps"]], "steps": chosen["steps"], "images": 128},
            "launch": {"processes": 1},
            "track": {"uri": chosen["tracking_uri"] or None, "log_model": False},
        }
    )
)
print(*plain.more_lines(), sep="\n")

# COMMAND ----------

# MAGIC %md
# MAGIC ## A denoiser before the network
# MAGIC
# MAGIC `jobs/denoise.py` trains a small vision transformer to undo attacks, and an embedding in which attacked
# MAGIC images lie apart. The network itself does not learn. What comes out is a model like any other. The
# MAGIC table has attacks through the denoiser, attacks that take its gradient for the identity's
# MAGIC (`bpda_pgd`), and attacks by somebody who does not know it (`unguarded_pgd`). A denoiser that looks
# MAGIC good under the last kind alone protects from nobody.

# COMMAND ----------

guarded = denoise(
    DenoiseAtConfig.model_validate(
        {
            "model": plain.model,
            "shards": folder / "shards",
            "run_dir": folder / "guarded",
            "resume": "auto",
            "attack": {"eps": chosen["eps"]},
            "train": {"epochs": chosen["epochs"], "lr": 1e-3, "validation_steps": 2},
            "evaluate": {"eps": [chosen["eps"]], "steps": chosen["steps"], "images": 128},
            "judge": {"fpr": 0.2, "images": 64, "adaptive": {"steps": 5, "searches": 1}},
            "launch": {"processes": 1},
            "track": {"uri": chosen["tracking_uri"] or None, "log_model": False},
        }
    )
)
print(*guarded.more_lines(), sep="\n")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Every detector
# MAGIC
# MAGIC All look at the guarded network. Half of the training images are their reference; the other half shows
# MAGIC them attacks. Clean validation images turn a score into a p-value: the share of clean images that are
# MAGIC at least as suspicious.

# COMMAND ----------

manifest = read_manifest(folder / "shards")
network = load_classifier(Path(guarded.model)).requires_grad_(False)
parts = {part: MappedSplit(folder / "shards", manifest, part) for part in ("train", "val", "test")}
rows = {p: np.arange(min(2 * int(chosen["images"]), len(split))) for p, split in parts.items()}
batches = {p: (*parts[p].tensors(rows[p]), torch.from_numpy(rows[p])) for p in parts}
known = find_layers(network, batches["train"][0][:1])
pairs = dict(reversed(grid(tuple(DETECTORS), (PENULTIMATE, EMBEDDING))))
look = Extractor.on(network, layers_of(pairs.items()), known.head)
attacked = AttackSettings(attacks=("pgd",), eps=(threat.eps,), steps=int(chosen["steps"]))
half = len(rows["train"]) // 2
reference, contrast = (
    [tuple(part[where] for part in batches["train"])] for where in (slice(half), slice(half, None))
)
calm = attacked.model_copy(update={"attacks": ()})
shown = gather(look, contrast, attacked, bits=manifest.bits)
head = network.get_submodule(known.head)
training = Training(
    reference=features_of(gather(look, reference, calm, bits=manifest.bits), "clean"),
    labels=reference[0][1],
    clean=features_of(shown, "clean"),
    noisy=features_of(shown, "noisy"),
    attacked=(features_of(shown, attacked.trials()[0].key),),
    head=(head.weight, head.bias),
)
detectors = {name: DETECTORS[name].fit(layer, training) for name, layer in pairs.items()}
calm_features = features_of(gather(look, [batches["val"]], calm, bits=manifest.bits), "clean")
scores = {name: each.score(calm_features).double().numpy() for name, each in detectors.items()}
guards = {name: Guard(each, scores[name], 0.05, "flag") for name, each in detectors.items()}

# COMMAND ----------

# MAGIC %md
# MAGIC ## One image through every guard
# MAGIC
# MAGIC The first test image, as it is; under PGD, which knows the network and no detector; and once for each
# MAGIC detector, under an attack on network and detector together. A small p-value is suspicious. Detectors
# MAGIC that see the second look away at the third: a figure without adaptive attacks means nothing.

# COMMAND ----------

image, label = batches["test"][0][:1], batches["test"][1][:1]
oblivious = pgd(network, image, label, threat=threat, steps=int(chosen["steps"]))
seen, settings = [], AdaptiveSettings(attacks=("selective",), steps=int(chosen["steps"]))
for name, detector in detectors.items():
    spread = max(float(scores[name].std()), 1e-9)
    target = Target(detector, float(scores[name].mean()), spread)
    own = Extractor.on(network, detector.layers, known.head)
    ((_, aimed),) = adaptive_attacks(target, own, image, label, threat=threat, settings=settings)
    versions = own(torch.cat([image, oblivious, aimed]))
    values = guards[name].p_values(detector.score(versions).double().numpy())
    answers = [manifest.classes[k] for k in versions.logits.argmax(1)]
    seen.append((name, aimed, values, answers))
print(f"{'guard':>12}  p-value and answer: clean, {'PGD':>5}, attacked with its detector")
for name, _, values, answers in seen:
    print(f"{name:>12}  ", "  ".join(f"{p:.2f} {a}" for p, a in zip(values, answers, strict=True)))

# COMMAND ----------

# MAGIC %md
# MAGIC The image, the attacked one and what the denoiser makes of both; then the image that was made for each
# MAGIC detector, with that detector's p-value.

# COMMAND ----------

cleaned = [network.denoiser(each) for each in (image, oblivious)]
panels = [image, oblivious, *cleaned, *(aimed for _, aimed, _, _ in seen)]
titles = [
    f"clean: {manifest.classes[int(label)]}",
    f"PGD at {eps_text(threat.eps)}",
    "clean, denoised",
    "PGD, denoised",
    *(f"{name}: p {values[2]:.2f}" for name, _, values, _ in seen),
]
sheet = contact_sheet([each[0].permute(1, 2, 0).numpy() for each in panels], titles)
print(show(sheet, name="05 one image", folder=pictures))
bars = Figure(figsize=(8, 3), layout="constrained")
axes = bars.subplots()
for place, version in enumerate(("clean", "PGD", "attacked with its detector")):
    axes.bar(
        np.arange(len(seen)) + 0.27 * place, [v[place] for _, _, v, _ in seen], 0.25, label=version
    )
axes.set_xticks(np.arange(len(seen)) + 0.27, [name for name, *_ in seen])
axes.axhline(0.05, color="black", linewidth=0.8)
axes.set_ylabel("p-value")
bars.legend(loc="outside right upper")
print(show(bars, name="05 p values", folder=pictures))

# COMMAND ----------

# MAGIC %md
# MAGIC `jobs/detect.py` does this for many images and attacks, chooses the best detector on validation images,
# MAGIC and keeps it as the model's guard. With `--track.register_as NAME`, `mlflow models serve` answers with
# MAGIC the label, its probability, whether the image is suspicious, and its p-value.
