# Databricks notebook source
# MAGIC %md
# MAGIC # 04 Federate it, and attack the federation
# MAGIC
# MAGIC Hospitals that may not share images can still train one network together: each trains on its own
# MAGIC images, and only weights travel. This notebook simulates such a federation on the shards of notebook
# MAGIC 01. Then some hospitals turn malicious and teach the network a backdoor, once against plain averaging
# MAGIC and once against a robust aggregation rule.
# MAGIC
# MAGIC A demonstration takes few images and few rounds. Give `rounds` and `clients` for more.

# COMMAND ----------

from pathlib import Path

from medspark.workflows.federate import federate
from medspark.workflows.federate_config import FederateConfig
from medspark.workflows.federate_report import describe_federation, federation_figure
from medspark.workflows.notebook import open_session, parameters, show

chosen = parameters(
    globals().get("dbutils"),
    folder="build/notebooks",
    model="test_efficientnet_gn",
    eps="2/255",
    clients="6",
    rounds="4",
    aggregate="multi_krum",
    images="64",
    experiment="medspark",
    tracking_uri="",
)
folder = Path(chosen["folder"])
pictures = folder / "pictures"
spark = open_session()

# COMMAND ----------

# MAGIC %md
# MAGIC ## A federation of hospitals with different patients
# MAGIC
# MAGIC Patients are divided so that each hospital sees diseases in other proportions (Dirichlet, alpha .5).
# MAGIC Every hospital trains with adversarial examples, as a part of a Spark task.

# COMMAND ----------

settings = {
    "shards": folder / "shards",
    "clients": {"by": "dirichlet", "count": chosen["clients"]},
    "rounds": chosen["rounds"],
    "model": {"name": chosen["model"]},
    "batch_size": 16,
    "lr": 2e-3,
    "attack": {"eps": chosen["eps"]},
    "validate_rounds": {"images": chosen["images"], "steps": 5},
    "evaluate": {"images": chosen["images"], "eps": [chosen["eps"]], "steps": 10},
    "overwrite": True,
    "track": {"experiment": chosen["experiment"], "uri": chosen["tracking_uri"] or None},
}
honest = federate(
    FederateConfig.model_validate(settings | {"run_dir": folder / "federation" / "honest"})
)
print(describe_federation(honest))
print(
    show(federation_figure(honest, eps=honest.worst_case[0].eps), name="04 honest", folder=pictures)
)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Two hospitals stamp a trigger on their images
# MAGIC
# MAGIC They label stamped images as they like (BadNets). The backdoor's success is the share of stamped test
# MAGIC images of other classes that get the attacker's class. The attack on a federation changes no image that
# MAGIC honest hospitals hold.

# COMMAND ----------

attacked = {}
for rule in ("fedavg", chosen["aggregate"]):
    attacked[rule] = federate(
        FederateConfig.model_validate(
            settings
            | {
                "run_dir": folder / "federation" / rule,
                "aggregate": rule,
                "adversary": {
                    "name": "badnets",
                    "clients": [0, 1],
                    "badnets": {"poisoned": 0.5, "epochs": 3},
                },
            }
        )
    )

# COMMAND ----------

# MAGIC %md
# MAGIC ## What came of it
# MAGIC
# MAGIC A rule that detects updates names the hospitals that it rejected. Compare the backdoor's success, and
# MAGIC compare the accuracy with that of the honest federation.

# COMMAND ----------

for rule, result in attacked.items():
    last = result.rounds[-1]
    print(f"{rule}: accuracy {result.clean.accuracy:.2f} (honest {honest.clean.accuracy:.2f}), ")
    print(f"  backdoor success {last.backdoor}, rejected in the last round: {last.rejected}")
    picture = federation_figure(result, eps=result.worst_case[0].eps)
    print(show(picture, name=f"04 attacked {rule}", folder=pictures))
