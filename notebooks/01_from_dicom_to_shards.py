# Databricks notebook source
# MAGIC %md
# MAGIC # 01 From DICOM to training shards
# MAGIC
# MAGIC A hospital's archive holds DICOM in a dozen encodings, PNG exports, duplicates, and a few unreadable
# MAGIC files. This notebook turns such an archive into **training shards**: Parquet files that a
# MAGIC network trains on without decoding the images again. It has three steps, each repeatable:
# MAGIC
# MAGIC 1. look at the archive (here a synthetic one that medspark writes),
# MAGIC 2. **ingest** it with Spark: decode once, de-identify, quarantine unusable files,
# MAGIC 3. **shard** the samples: split by patient, shuffle, write the manifest last.
# MAGIC
# MAGIC On Databricks, install the wheel on the cluster and give a Volume as `folder`
# MAGIC (`/Volumes/CATALOG/SCHEMA/VOLUME/medspark`). Elsewhere `MEDSPARK_FOLDER=… python THIS_FILE` does the
# MAGIC same. To use your own images, give their folder as `source` and their label table as `labels`. If the
# MAGIC driver's home is deleted with its cluster, also give a permanent file as `key_file` (32 random bytes).
# MAGIC Patients get pseudonyms from this key, and without it nothing can be added later.

# COMMAND ----------

import json
from pathlib import Path

import numpy as np
import pydicom

from medspark.data.native import MappedSplit
from medspark.images.deidentify import Privacy
from medspark.images.phantom import PhantomConfig, write_archive
from medspark.ingest.archive import open_archive
from medspark.ingest.config import IngestConfig
from medspark.ingest.pipeline import ingest
from medspark.sharding.build import make_shards, open_samples
from medspark.sharding.config import ShardConfig
from medspark.workflows.notebook import contact_sheet, open_session, parameters, show
from medspark.shards.manifest import read_manifest

chosen = parameters(
    globals().get("dbutils"),
    folder="build/notebooks",
    source="",
    labels="",
    key_file="",
    count="240",
    image_size="64",
)
folder = Path(chosen["folder"])
pictures = folder / "pictures"
spark = open_session()

# COMMAND ----------

# MAGIC %md
# MAGIC ## The archive
# MAGIC
# MAGIC Without `source`, the phantom generator writes synthetic chest radiographs of normal and pneumonic
# MAGIC lungs as DICOM files in seven transfer syntaxes and as PNG, at 8, 12 and 16 bits. It adds damaged and
# MAGIC duplicate files, as real archives contain.

# COMMAND ----------

source, labels = chosen["source"], chosen["labels"]
if not source:
    source, labels = str(folder / "archive"), str(folder / "archive" / "labels.csv")
    if not Path(labels).exists():
        print(write_archive(source, PhantomConfig(count=int(chosen["count"]))))

files = sorted(path for path in Path(source).rglob("*") if path.is_file())
print(f"{len(files)} files, for example:")
for path in files[:: max(1, len(files) // 8)][:8]:
    print(f"  {path.relative_to(source)}  {path.stat().st_size:,} bytes")

# COMMAND ----------

# MAGIC %md
# MAGIC A header identifies a person by names, numbers and dates. None of these may leave this folder.

# COMMAND ----------

dicoms = [path for path in files if pydicom.misc.is_dicom(path)]
if dicoms:
    header = pydicom.dcmread(dicoms[0], stop_before_pixels=True, force=True)
    for keyword in ("PatientName", "PatientID", "StudyDate", "Modality", "Rows", "BitsStored"):
        print(f"{keyword:>12}: {header.get(keyword, '')}")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Ingest
# MAGIC
# MAGIC Every file is decoded once, on the executors. It becomes a **sample**, a **duplicate**, or a row of
# MAGIC the **quarantine** with a reason. No file crashes the job or is lost silently, as the sum of the counts
# MAGIC shows. A second run over the same archive adds nothing.

# COMMAND ----------

samples, key_file = str(folder / "samples"), chosen["key_file"]
counts = ingest(
    spark,
    open_archive(
        IngestConfig(
            source=source,
            labels=labels or None,
            samples=samples,
            image_size=int(chosen["image_size"]),
            privacy=Privacy(key_file=Path(key_file) if key_file else None),
        )
    ),
)
print(
    f"{counts['files_seen']} files seen = {counts['samples']} samples + {counts['duplicates']} duplicates "
    f"+ {counts['quarantined']} quarantined"
)
for reason, count in counts["quarantine_reasons"].items():
    print(f"  {count:>4} {reason}")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Shards
# MAGIC
# MAGIC A keyed hash of the patient decides the split. So no patient is in two splits, and adding files moves
# MAGIC no patient. The **manifest** is written last and names every file with its SHA-256. Training reads the
# MAGIC manifest first and refuses a folder without one.

# COMMAND ----------

shards = folder / "shards"
shard_config = ShardConfig(samples=samples, shards=shards)
make_shards(spark, shard_config, open_samples(shard_config))
manifest = read_manifest(shards)
print(f"digest {manifest.digest[:16]}…, {manifest.height} × {manifest.width} × {manifest.channels}")
for name, split in manifest.splits.items():
    by_class = dict(zip(manifest.classes, split.class_counts, strict=True))
    print(f"{name:>6}: {split.rows} images of {split.patients} patients, {json.dumps(by_class)}")
print(f"leak check: {manifest.leak_check}")

# COMMAND ----------

# MAGIC %md
# MAGIC The shards are ordinary Parquet files that any tool opens. Training maps them into memory and copies
# MAGIC images by row number. These are the first images of the training split, as a network sees them:

# COMMAND ----------

train = MappedSplit(shards, manifest, "train")
images, numbers = train.gather(np.arange(min(12, len(train))))
titles = [manifest.classes[number] for number in numbers]
print(show(contact_sheet(images, titles), name="01 training images", folder=pictures))

# COMMAND ----------

# MAGIC %md
# MAGIC Next: **02 Train robustly and compare scales** reads `folder/shards`.
