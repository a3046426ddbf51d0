"""The session: shipped packages, spellings of masters, and messages of failed tasks."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pyspark.sql import SparkSession

from medspark.errors import RunError, UsageError
from medspark.spark.session import (
    SparkConfig,
    _cause,
    _check_encrypted,
    _chosen,
    _connected,
    _retrying,
    spark_session,
    task_errors,
)
from medspark.spark.ship import package_zip

FAILED = """
  An exception was thrown from the Python worker. Please see the stack trace below.
Traceback (most recent call last):
  File "/x/shards.py", line 1, in _check
    raise RunError("The part p has been damaged.")
medspark.errors.RunError: The part p has been damaged.

Driver stacktrace:
Caused by: org.apache.spark.SparkException: Job aborted
"""


def imported(archive: Path) -> str:
    """Return the file of medspark.errors if ``archive`` is first on the path."""
    archive.write_bytes(package_zip())
    code = (
        f"import sys; sys.path = [{str(archive)!r}, *sys.path]; "
        "import medspark.errors; print(medspark.errors.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.strip()


def test_the_shipped_package_imports_from_its_byte_code_where_nothing_is_installed(tmp_path):
    archive = tmp_path / "medspark.zip"

    assert imported(archive) == f"{archive}/medspark/errors.pyc"


def test_a_worker_with_another_python_reads_the_shipped_source(tmp_path, monkeypatch):
    archive = tmp_path / "medspark.zip"
    package_zip.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "MAGIC_NUMBER", b"\0\0\r\n")
        found = imported(archive)
    package_zip.cache_clear()

    assert found == f"{archive}/medspark/errors.py"


def test_what_was_shipped_is_removed_when_the_driver_ends():
    code = "from medspark.spark.ship import package_file; print(package_file(), package_file())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    first, second = done.stdout.split()
    assert first == second
    assert not Path(first).parent.exists()


@pytest.mark.parametrize(
    ("master", "retrying"),
    [
        ("local", "local[1,4]"),
        ("local[*]", "local[*,4]"),
        ("local[3]", "local[3,4]"),
        ("local[3,1]", "local[3,1]"),
        ("spark://host:7077", "spark://host:7077"),
    ],
)
def test_a_local_task_that_dies_is_tried_again_as_on_a_cluster(master, retrying):
    assert _retrying(master) == retrying


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FAILED, "The part p has been damaged."),
        (FAILED.replace("medspark.errors.RunError", "OSError"), "OSError: The part p"),
        (
            "An error occurred while calling z:x.runJob.\n: org.apache.spark.SparkException: Job "
            "aborted: Python worker exited unexpectedly (crashed)\nCaused by: java.io.EOFException",
            "a Python worker ended unexpectedly",
        ),
        ("java.io.IOException: No space left on device\n\tat x", "No space left on device"),
    ],
)
def test_what_went_wrong_in_a_task_is_said_in_one_line(text, said):
    assert said in _cause(text)


def test_an_error_of_spark_becomes_ours():
    from pyspark.errors import PySparkRuntimeError

    with pytest.raises(RunError, match="A Spark task failed"), task_errors():
        raise PySparkRuntimeError("boom")


def settled(master, submitted=None, environment=None, **settings):
    """Return the settings that Spark finally gets."""
    return _chosen(settings, master, (submitted or {}).get, environment or {})


LOCAL = ["local", "local[2]", "local[*]", "local[3,4]"]
CLUSTERS = ["spark://host:7077", "yarn", "k8s://https://host:6443", "local-cluster[2,1,1024]"]


@pytest.mark.parametrize("master", LOCAL)
def test_a_local_spark_is_on_loopback_and_its_ui_off(master):
    told = settled(master)

    assert told["spark.driver.host"] == told["spark.driver.bindAddress"] == "127.0.0.1"
    assert told["spark.ui.enabled"] == "false"


@pytest.mark.parametrize("master", CLUSTERS)
def test_on_a_cluster_the_driver_stays_where_the_others_reach_it(master):
    assert not {"spark.driver.host", "spark.driver.bindAddress", "spark.ui.enabled"} & {
        *settled(master)
    }


@pytest.mark.parametrize(
    ("address", "ui"),
    [(None, "false"), ("", "false"), ("10.0.0.7", "false"), ("0.0.0.0", "false"),
     ("127.0.0.1", "true"), ("::1", "true"), ("localhost", "true")],
)  # fmt: skip
@pytest.mark.parametrize("by", ["submitted", "settings"])
def test_the_ui_that_somebody_wants_is_on_loopback_or_off(address, ui, by):
    wanted = {"spark.ui.enabled": "true"}
    environment = {"SPARK_LOCAL_IP": address} if address is not None else {}

    told = (
        settled("local[2]", wanted, environment)
        if by == "submitted"
        else settled("local[2]", None, environment, **wanted)
    )

    assert told.get("spark.ui.enabled", "true") == ui


def test_what_was_submitted_and_what_the_configuration_says_comes_before_ours():
    submitted = {"spark.speculation": "true", "spark.driver.host": "10.0.0.7"}

    told = settled("local[2]", submitted, **{"spark.sql.session.timeZone": "CET"})

    assert not {"spark.speculation", "spark.driver.host"} & {*told}
    assert told["spark.sql.session.timeZone"] == "CET"
    assert told["spark.dynamicAllocation.enabled"] == "false"


def test_a_standalone_cluster_without_its_secret_is_refused_in_a_sentence():
    master, secure = "spark://host:7077", {"spark.authenticate": "true"}

    with pytest.raises(UsageError, match=r"spark.authenticate.secret .* --properties-file\.$"):
        settled(master, **secure)

    with pytest.raises(UsageError, match=r"workers of spark://host:7077"):
        settled(master, secure)
    settled(master)
    settled(master, {"spark.authenticate.secret": "s"}, **secure)
    for makes_its_own in ("yarn", "k8s://https://host:6443", "local[2]"):
        settled(makes_its_own, **secure)


class Builder:
    """Collects the settings of a session."""

    def __init__(self):
        self.settings = {}

    def appName(self, name):  # noqa: N802 - Spark's name
        return self

    def config(self, key, value):
        self.settings[key] = value
        return self

    def getOrCreate(self):  # noqa: N802 - Spark's name
        return SimpleNamespace(made_with=self.settings)


def test_a_server_elsewhere_gets_what_a_session_can_set_and_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(SparkSession, "builder", Builder())

    session = _connected(SparkConfig(settings={"spark.task.cpus": "2"}), "a job")

    assert session.made_with["spark.task.cpus"] == "2"
    assert session.made_with["spark.sql.session.timeZone"] == "UTC"
    assert all(
        key.startswith("spark.sql.") for key in session.made_with.keys() - {"spark.task.cpus"}
    )


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("remote", ["local[2]", "sc://host:15002"])
def test_without_the_libraries_of_connect_a_sentence_names_the_extra(remote, monkeypatch):
    monkeypatch.setenv("SPARK_REMOTE", remote)
    monkeypatch.setitem(sys.modules, "pyspark.sql.connect.session", None)

    with (
        pytest.raises(UsageError, match=r"pip install 'medspark\[connect\]'\.$"),
        spark_session(SparkConfig()),
    ):
        pass


def test_a_connect_session_that_has_to_be_encrypted_is_refused():
    class Connected:
        __module__ = "pyspark.sql.connect.session"

    with pytest.raises(UsageError, match=r"needs a classic session\.$"):
        _check_encrypted(Connected())


def read_profile(name):
    path = Path(__file__).parents[2] / "conf" / "profiles" / f"{name}.yaml"
    return yaml.safe_load(path.read_text())["spark"]


def test_the_secure_profile_has_what_the_clusters_profile_has():
    settings = read_profile("secure")["settings"]

    assert settings.items() >= read_profile("cluster")["settings"].items()


@pytest.mark.parametrize(
    "name",
    ["spark.authenticate.secret", "spark.hadoop.fs.s3a.secret.key", "spark.my.password",
     "api_token", "spark.ssl.keyPassword", "spark.medspark.hmac", "pseudonym_key",
     "spark.fs.access.key", "spark.credential", "privacy.key_file"],
)  # fmt: skip
def test_the_secure_profile_hides_what_looks_like_a_secret(name):
    assert re.search(read_profile("secure")["settings"]["spark.redaction.regex"], name)


@pytest.mark.spark
def test_a_session_that_is_not_encrypted_is_refused_and_left_running(spark):
    config = SparkConfig(encrypted=True, settings={"spark.authenticate": "true"})

    with (
        pytest.raises(UsageError, match=r"without spark.authenticate and spark.network.crypto"),
        spark_session(config),
    ):
        pass

    assert spark.range(3).count() == 3


IN_FORCE = """
import sys
from medspark.config import load_config
from medspark.errors import UsageError
from medspark.spark.session import SparkConfig, spark_session
from medspark.job import JobConfig

class Job(JobConfig):
    spark: SparkConfig = SparkConfig()

config = load_config(Job, sys.argv[1:]).spark
try:
    with spark_session(config) as spark:
        print("sum", spark.sparkContext.range(100).repartition(2).sum())
except UsageError as error:
    print("refused", error)
"""


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("", "sum 4950"),
        ("spark.network.crypto.enabled", "without spark.network.crypto.enabled:"),
        ("spark.io.encryption.enabled", "without spark.io.encryption.enabled:"),
    ],
    ids=["whole", "network", "disk"],
)
def test_the_secure_profile_is_in_force_or_the_session_refused(tmp_path, lacks, said):
    profile = {"spark": read_profile("secure") | {"master": "local[2]"}}
    profile["spark"]["settings"].pop(lacks, None)
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))

    done = subprocess.run(
        [sys.executable, "-c", IN_FORCE, "--profile", tmp_path / "profile.yaml"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip

    assert said in done.stdout
