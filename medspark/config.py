"""Typed configuration: a frozen model beside the code it configures, filled from YAML and argv."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator

from medspark.errors import UsageError
from medspark.redact import HIDDEN, is_secret, redacted, safe_text

# Only commands need pydantic-settings and a YAML library; a device that predicts has neither.
if TYPE_CHECKING:
    from pydantic_settings import CliSettingsSource

# What Path makes of an address such as s3://bucket/folder.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/")


class Config(BaseModel):
    """Base of every configuration: frozen and picklable. It refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="after")
    @classmethod
    def _is_no_address(cls, value: Any) -> Any:
        # medspark.remote has the type of settings that may be addresses.
        if type(value) is type(Path()) and _ADDRESS.match(str(value)):
            place = str(value).replace(":/", "://", 1)
            raise ValueError(
                f"{place} is an address: this has to be a path that all machines share"
            )
        return value


class TrainingConfig(Config):
    """Settings of a training; each class declares what its settings decide.

    A setting decides the trained weights, or only the report on them, or only where and how the
    work is done. Subclasses inherit the declarations. Defining a class with a setting that is not
    declared exactly once raises TypeError.
    """

    decides_weights: ClassVar[frozenset[str]] = frozenset()
    decides_report: ClassVar[frozenset[str]] = frozenset()
    decides_nothing: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        declared = ("decides_weights", "decides_report", "decides_nothing")
        for name in declared:
            setattr(cls, name, frozenset().union(*(vars(c).get(name, ()) for c in cls.__mro__)))
        for field in cls.model_fields:
            times = sum(field in getattr(cls, name) for name in declared)
            if times != 1:
                raise TypeError(
                    f"{cls.__name__}.{field} has to be in exactly one of {', '.join(declared)}"
                )

    def deciding_weights(self) -> dict[str, Any]:
        """Return the settings that decide the weights, nested ones too, in the form of JSON."""
        chosen = self.model_dump(mode="json", include=set(self.decides_weights))
        for name in chosen:
            inner = getattr(self, name)
            if isinstance(inner, TrainingConfig):
                chosen[name] = inner.deciding_weights()
        return chosen


def _whole(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


# The depth of an image. A choice between numbers has to be read from argv's text explicitly.
Bits = Annotated[Literal[8, 16], BeforeValidator(_whole)]

C = TypeVar("C", bound=Config)

_LARGEST_YAML = 1 << 18


def load_config(cls: type[C], argv: Sequence[str], *, description: str = "") -> C:
    """Return ``cls`` filled from, in rising order of precedence, defaults, files and ``argv``.

    ``argv`` may hold ``--config FILE`` (what the job does), ``--profile FILE`` (where it runs), and
    any key by its dotted path (``--train.epochs 6``), including entries of a mapping
    (``--weights.resnet50 FILE``). Raises UsageError that names the unknown or invalid key.
    ``--help`` prints every key with its default and exits.
    """
    from pydantic_settings import SettingsError

    parser = _Parser(
        usage="spark-submit jobs/JOB.py [--config FILE] [--profile FILE] [--KEY VALUE ...]",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of what the job does")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="YAML of where it runs")
    values: dict[str, Any] = {}
    keys = dotted_keys(cls)
    try:
        words = _whole_mappings(_flags(argv, _keys_of(cls, bool)), _keys_of(cls, dict))
        words = _joined(words, _keys_of(cls, tuple, list))
        source, chosen = _parse(cls, parser, words)
        for path in (chosen.config, chosen.profile):
            if path is not None:
                values = _merge(values, _read_yaml(path))
        return cls.model_validate(_merge(values, source()))
    except ValidationError as error:
        raise UsageError(_explain(error, keys)) from None
    except (SettingsError, argparse.ArgumentError) as error:
        raise UsageError(safe_text(_one_line(str(error)))) from None


def dotted_keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted path of every key of ``cls``, nested ones included."""
    keys: list[str] = []
    for name, field in cls.model_fields.items():
        keys.append(prefix + name)
        if section := _section(field.annotation):
            keys += dotted_keys(section, f"{prefix}{name}.")
    return keys


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that is a section of keys, required or not."""
    kinds = get_args(annotation)
    if type(None) in kinds:
        return next((found for kind in kinds if (found := _section(kind))), None)
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _keys_of(cls: type[BaseModel], *kinds: type, prefix: str = "") -> list[str]:
    """Return the dotted paths of the keys of ``cls`` whose values are of one of ``kinds``."""
    found: list[str] = []
    for name, field in cls.model_fields.items():
        if (get_origin(field.annotation) or field.annotation) in kinds:
            found.append(prefix + name)
        elif section := _section(field.annotation):
            found += _keys_of(section, *kinds, prefix=f"{prefix}{name}.")
    return found


def _flags(argv: Sequence[str], switches: Sequence[str]) -> list[str]:
    """Return ``argv`` with each key of ``switches`` that has no value written ``--key=true``."""
    names, after = {f"--{key}" for key in switches}, [*argv[1:], "--"]
    return [
        f"{word}=true" if word in names and follows.startswith("--") else word
        for word, follows in zip(argv, after, strict=False)
    ]


def _whole_mappings(argv: Sequence[str], mappings: Sequence[str]) -> list[str]:
    """Return ``argv`` with ``--mapping.key value`` written ``--mapping={"key": "value"}``."""
    words, written = list(argv), []
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        mapping = next((m for m in mappings if name.startswith(f"{m}.")), None)
        if mapping and word.startswith("--") and (equals or words):
            entry = {name.removeprefix(f"{mapping}."): value if equals else words.pop(0)}
            word = f"--{mapping}={json.dumps(entry)}"
        written.append(word)
    return written


def _joined(argv: Sequence[str], sequences: Sequence[str]) -> list[str]:
    """Return ``argv`` with the words after a key of ``sequences`` joined: ``--eps 1 2`` as 1,2."""
    joined: list[str] = []
    for word in argv:
        key = joined[-2].removeprefix("--") if len(joined) > 1 else ""
        if key in sequences and not word.startswith("-") and not joined[-1].startswith("-"):
            joined[-1] = f"{joined[-1]},{word}"
        else:
            joined.append(word)
    return joined


class _Parser(argparse.ArgumentParser):
    """Raises an error for a mistake, instead of printing the usage and exiting."""

    def error(self, message: str) -> Any:
        raise argparse.ArgumentError(None, message)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _parse(
    cls: type[Config], parser: _Parser, argv: list[str]
) -> tuple[CliSettingsSource[Any], argparse.Namespace]:
    from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

    settings = type(
        cls.__name__,
        (cls, BaseSettings),
        {
            "__module__": cls.__module__,
            "model_config": SettingsConfigDict(
                frozen=True,
                extra="forbid",
                protected_namespaces=(),
                cli_hide_none_type=True,
                cli_avoid_json=True,
                cli_use_class_docs_for_groups=True,
                cli_exit_on_error=False,
            ),
        },
    )
    unknown = _unknown_keys(argv, [*dotted_keys(cls), "config", "profile", "help", "h"])
    if unknown:
        raise UsageError(unknown)
    source: CliSettingsSource[Any] = CliSettingsSource(settings, root_parser=parser)
    chosen = parser.parse_args(argv)
    return source(parsed_args=chosen), chosen


def _unknown_keys(argv: list[str], keys: list[str]) -> str:
    for word in argv:
        match = re.match(r"--?([A-Za-z][\w.]*)(=|$)", word)
        if match and match[1] not in keys:
            return _unknown(match[1], keys)
    return ""


def _unknown(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1)
    hint = f"did you mean {close[0]}?" if close else "--help lists them all."
    return f"There is no key {key}; {hint}"


def first_problem(error: ValidationError, *, below: str = "") -> str:
    """Return the first thing wrong with a document, short and in one line, with its dotted path.

    ``below`` is the path of the part that was validated.
    """
    problem = error.errors()[0]
    key = ".".join(str(part) for part in (below, *problem["loc"]) if part != "")
    text = problem["msg"]
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
    elif problem["type"] == "extra_forbidden":
        text = "there is no such key"
    return _one_line(f"{key[:100]}: {text}" if key else text)


def _read_yaml(path: Path) -> dict[str, Any]:
    from medspark.yaml_documents import parse_yaml

    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_YAML + 1)
        if len(content) > _LARGEST_YAML:
            raise UsageError(f"{path} is larger than {_LARGEST_YAML} bytes.")
        values = parse_yaml(content) or {}
    except OSError as error:
        raise UsageError(
            f"The configuration file {path} cannot be read: {error.strerror}."
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not YAML that can be read: {error}.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} should hold keys and values.")
    return values


def _merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged


def _first_below(key: str, keys: list[str]) -> str:
    """Return ``key``, or the first of ``keys`` below it if it is a group of keys."""
    return next((other for other in keys if other.startswith(f"{key}.")), key)


def _explain(error: ValidationError, keys: list[str]) -> str:
    sentences = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            sentences.append(_unknown(key, keys))
        elif problem["type"] == "missing":
            sentences.append(f"{key} is needed: give --{_first_below(key, keys)}.")
        elif problem["type"] == "value_error":
            sentences.append(
                f"{key}: {problem['ctx']['error']}" if key else f"{problem['ctx']['error']}"
            )
        else:
            shown = HIDDEN if is_secret(key) else repr(redacted(problem["input"]))
            sentences.append(f"{key} cannot be {shown}: {problem['msg'].lower()}.")
    return _one_line(safe_text(" ".join(sentences)))


def _one_line(text: str) -> str:
    return " ".join(text.split())
