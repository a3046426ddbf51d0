"""No password, token or key is written down, whatever the address or the setting looks like."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.config import Config, load_config
from medspark.errors import RunError, UsageError
from medspark.job import JobConfig, run_job, write_result
from medspark.redact import RedactingFormatter, is_secret, redacted, redacted_command, safe_text

WORDS = st.text("abcXYZ0189", min_size=1, max_size=8)
# Never part of an address's other pieces.
PASSWORDS = st.text("QRSTU!$'()*,;=@:%", min_size=3, max_size=12).filter(str.strip)
SECRET_NAMES = (
    "spark.authenticate.secret", "spark.hadoop.fs.s3a.secret.key", "spark.ssl.keyPassword",
    "fs.azure.account.key.mine.dfs.core.windows.net", "MLFLOW_TRACKING_TOKEN", "apiKey", "PASSWD",
    "fs.azure.sas.box.mine.blob.core.windows.net", "db_pwd", "ssl.key-store.passphrase",
)  # fmt: skip
PLAIN_NAMES = ("spark.master", "train.epochs", "track.uri", "privacy.key_file", "model.weights")


@given(scheme=st.sampled_from(["https", "postgresql+psycopg2", "s3"]), user=WORDS, secret=PASSWORDS)
def test_user_info_never_stays_in_a_text(scheme: str, user: str, secret: str) -> None:
    for written in {secret, quote(secret, safe="")}:
        told = safe_text(f"no answer from {scheme}://{user}:{written}@host:80/a/b, try again")

        assert told == f"no answer from {scheme}://***@host:80/a/b, try again"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://token@host/x", "https://***@host/x"),
        ("https://u:pa/ss@host/x", "https://***@host/x"),
        ("https://host:80/a@b https://h/models:/chest@best", None),
        ("sqlite:////data/mlruns/mlflow.db", None),
        ("models:/chest@candidate", None),
        ("dr@hospital.org wrote", None),
        ("https://h/x?a=1&access_token=abc&b=2", "https://h/x?a=1&access_token=***&b=2"),
        ("https://h/x?sv=1&sig=ab%2F", "https://h/x?sv=1&sig=***"),
        ("jdbc:mysql://h/db;password=abc", "jdbc:mysql://h/db;password=***"),
        ("#/experiments/1/runs?a=b&orderByKey=metrics.%60auroc%60&orderByAsc=false", None),
    ],
)
def test_only_the_secret_of_an_address_is_hidden(text: str, told: str | None) -> None:
    assert safe_text(text) == (told or text)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_what_a_secret_name_holds_is_hidden_at_any_depth(name: str) -> None:
    document = {"a": [{name: "hunter2"}], name: {"x": ["hunter2"]}, "n": (name, "kept")}

    assert is_secret(name)
    assert "hunter2" not in json.dumps(redacted(document))
    assert redacted(document)["n"] == [name, "kept"]


@given(st.dictionaries(st.sampled_from(PLAIN_NAMES), st.integers() | st.text("ab/:.@ ")))
def test_what_is_no_secret_stays(document: dict[str, Any]) -> None:
    assert redacted(document) == document


def test_a_class_that_is_called_like_a_secret_keeps_its_count() -> None:
    assert redacted({"class_counts": {"keyhole": 3}, "key": None}) == {
        "class_counts": {"keyhole": 3}, "key": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["--track.uri", "https://u:hunter2@h"],
        ["--track.uri=https://u:hunter2@h"],
        ["--spark.settings.spark.authenticate.secret", "hunter2"],
        ["--spark.settings.spark.authenticate.secret=hunter2"],
        ["--spark.settings", '{"spark.authenticate.secret": "hunter2"}'],
        ["--conf", "spark.ssl.keyPassword=hunter2"],
    ],
)
def test_a_command_line_is_kept_without_its_secrets(words: list[str]) -> None:
    told = redacted_command(["jobs/scale_at.py", *words, "--repeats", "3"])

    assert "hunter2" not in told
    assert shlex.split(told)[0] == "jobs/scale_at.py"
    assert told.endswith("--repeats 3")


class Spark(Config):
    """Where Spark runs."""

    settings: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it


class Job(JobConfig):
    """A job."""

    uri: str = ""
    epochs: int = 1
    spark: Spark = Spark()


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "https://u:hunter2@h/x"],
        ["--spark", "https://u:hunter2@h/x"],
        ["https://u:hunter2@h/x"],
    ],
)
def test_a_mistake_on_the_command_line_is_told_without_the_secret(argv: list[str]) -> None:
    with pytest.raises(UsageError) as told:
        load_config(Job, argv)

    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize(
    "text",
    ["spark: {settings: {ssl.keyPassword: 31337}}", "spark: {settings: [{secret: '31337'}]}"],
)
def test_a_mistake_in_a_file_is_told_without_the_secret(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)

    with pytest.raises(UsageError, match=r"spark\.settings") as told:
        load_config(Job, ["--config", str(tmp_path / "c.yaml")])

    assert "31337" not in str(told.value)


def test_log_lines_and_their_tracebacks_hold_no_secret() -> None:
    try:
        raise ConnectionError("no answer from https://u:hunter2@h/api")
    except ConnectionError as error:
        record = logging.LogRecord(
            "x", 20, "", 0, "%s is away", ("https://u:hunter2@h",), (type(error), error, None)
        )

    line = RedactingFormatter("%(message)s").format(record)

    assert line.startswith("https://***@h is away")
    assert "ConnectionError" in line
    assert "hunter2" not in line


def test_a_result_is_written_without_secrets(tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", {"uri": "https://u:hunter2@h", "token": "hunter2", "n": 3})

    assert json.loads((tmp_path / "r.json").read_text()) == {
        "uri": "https://***@h", "token": "***", "n": 3,
    }  # fmt: skip


def _fails(config: Job) -> dict[str, Any]:
    logging.getLogger(__name__).warning("%s is away", config.uri)
    kinds = {1: UsageError, 2: RunError, 3: OSError}
    raise kinds[config.epochs](f"no answer from {config.uri}")


@pytest.mark.parametrize("way", [1, 2, 3])
def test_however_a_job_ends_its_output_holds_no_secret(
    way: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--uri", "https://u:hunter2@h/x", "--epochs", str(way), "--output", f"{tmp_path}/o"]

    assert run_job(Job, _fails, argv) != 0

    said = "".join(capsys.readouterr())
    assert "no answer from https://***@h/x" in said
    assert "hunter2" not in said
