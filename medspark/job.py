"""Run a job: load its configuration, write its JSON result, and return its exit status."""

from __future__ import annotations

import errno
import json
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field

from medspark.config import Config, load_config
from medspark.errors import MedsparkError, UsageError
from medspark.files import write_whole
from medspark.redact import RedactingFormatter, redacted, redacted_command, safe_text
from medspark.versions import of_process, weaknesses

logger = logging.getLogger(__name__)

DONE, FAILED, MISUSED = 0, 1, 2

# A full disk is reported in one sentence; other OSErrors print a traceback.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class JobConfig(Config):
    """The settings of every job."""

    output: Path | None = Field(
        None, description="file for the result as JSON; below build/results by default"
    )


J = TypeVar("J", bound=JobConfig)


class Result(Config):
    """A result document, or a part of one.

    Unknown fields, which another version of medspark wrote, are kept.
    """

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="constants")

    def as_json(self) -> dict[str, Any]:
        """Return the document as JSON values, with only the fields that were set."""
        return self.model_dump(mode="json", exclude_unset=True)


def run_job(cls: type[J], work: Callable[[J], Result | dict[str, Any]], argv: Sequence[str]) -> int:
    """Load the configuration, do the ``work``, write its result, and return the exit status.

    The status is 0 if the job is done, 1 if it failed, and 2 if the configuration or the input is
    wrong (one sentence, no traceback). The last line printed is the path of the result.
    """
    module = sys.modules[work.__module__]  # the job's module, whose docstring is the help text
    name = Path(getattr(module, "__file__", None) or "job").stem
    log_to_terminal()
    logging.getLogger("py4j").setLevel(logging.WARNING)
    try:
        config = load_config(cls, argv, description=module.__doc__ or "")
        output = config.output or Path("build/results") / f"{name}.json"
        _check_writable(output)
        done = work(config)
        document = done.as_json() if isinstance(done, Result) else done
        result = {"job": name} | document | {"versions": of_process()}
        write_result(output, result)
    except UsageError as error:
        print(safe_text(f"{name}: {error}"), file=sys.stderr)
        return MISUSED
    except MedsparkError as error:
        print(safe_text(f"{name} failed: {error}"), file=sys.stderr)
        return FAILED
    except Exception as error:  # noqa: BLE001 - the outermost edge: status 1 is part of the contract
        if isinstance(error, OSError) and error.errno in _FULL:
            print(safe_text(f"{name} failed: {_full(error)}"), file=sys.stderr)
        else:
            print(safe_text(traceback.format_exc()), file=sys.stderr, end="")
        return FAILED
    for sentence in weaknesses(result["versions"]):
        logger.warning(sentence)
    print(output)
    return DONE


def _full(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"The disk is full{where}: make room, then give the same command again."


def log_to_terminal() -> None:
    """Log to standard error, without the secrets in URLs."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(name)s: %(message)s"))
    handler.addFilter(_tells_more_than_a_retry)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _tells_more_than_a_retry(record: logging.LogRecord) -> bool:
    """Return whether ``record`` is to be shown; py4j's tracebacks of what it tries again are not.

    It logs them by the root logger, so that the level of its own does not silence them.
    """
    of_py4j = "py4j" in Path(record.pathname).parts
    return not of_py4j or record.levelno >= logging.WARNING


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write ``result`` as JSON, atomically and without secrets."""
    write_whole(path, json.dumps(redacted(result), indent=1, default=str) + "\n")


def command_line() -> str:
    """Return the command line that started this process, without the secrets in it."""
    program = Path(sys.argv[0])
    by_name = program.name == "medspark" or program.parts[-2:] == ("medspark", "__main__.py")
    started = ["medspark"] if by_name else ["spark-submit", sys.argv[0]]
    return redacted_command([*started, *sys.argv[1:]])


def _check_writable(path: Path) -> None:
    """Raise UsageError if a trial write of the result fails."""
    if path.is_dir():
        raise UsageError(f"The result cannot be written to {path}: it is a folder.")
    if path.parent.is_file():
        raise UsageError(f"The result cannot be written to {path}: {path.parent} is a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UsageError(f"The result cannot be written to {path}: {error.strerror}.") from None
