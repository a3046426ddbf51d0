"""Read a table of labels, patients, splits and sites: CSV, TSV or Parquet."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import Field
from pyspark.sql.pandas.types import from_arrow_schema

from medspark import storage
from medspark.config import Config
from medspark.errors import UsageError
from medspark.images.deidentify import Pseudonyms
from medspark.ingest.labels import SPLIT_NAMES, check_length, join_findings

# Cells of a finding's column. pandas writes 1 as 1.0 in a column with missing values.
_PRESENT = {"1", "1.0", "true"}
_UNCERTAIN = {"-1", "-1.0"}
_ABSENT = {"0", "0.0", "false", None}

# Rows to try, before Spark starts, until one names an existing file. If none of this many rows
# does, a longer table is accepted, and the join decides later.
_PROBED_ROWS = 100_000

Match = Literal["path", "name", "stem"]

# File name endings that a stem leaves out: of images and of compressed files. Other dots belong to
# the stem, as in a DICOM UID.
_ENDINGS = {
    *(".dcm", ".dicom", ".dic", ".ima", ".png", ".jpg", ".jpeg", ".jpe", ".jp2", ".tif", ".tiff"),
    *(".bmp", ".nii", ".gz", ".bz2", ".xz", ".zst"),
}

_ROLES = frozenset({"path", "label", "patient_id", "split", "site"})
_FINDING = "finding "


class LabelConfig(Config):
    """Columns and conventions of a label table."""

    path: str = Field("path", description="column of the file's path")
    label: str = Field("label", description="column of the class")
    patient_id: str = Field("patient_id", description="column of the patient, if there is one")
    split: str = Field("split", description="column of train, val or test, if there is one")
    site: str = Field("site", description="column of the hospital or scanner, if there is one")
    match: Match = Field(
        "path",
        description="the part of the path that identifies the file: the whole path, its name, or "
        "its name without the endings of image files, such as .dcm or .dcm.gz",
    )
    separator: str | None = Field(
        None,
        min_length=1,
        description="separator of labels, such as |, if an image may have several; each label is "
        "then a finding, present or absent",
    )
    no_finding: str = Field(
        "No Finding",
        description="with a separator, the label of an image without findings; an empty label "
        "means the same",
    )
    findings: tuple[str, ...] = Field(
        (),
        description="instead of label, one column per finding: 1 if the image has it, 0 or empty "
        "if not",
    )
    uncertain: Literal["absent", "present"] = Field(
        "absent", description="meaning of -1 in the column of a finding"
    )

    @property
    def several(self) -> bool:
        """Whether an image may have any number of labels."""
        return self.separator is not None or bool(self.findings)

    @property
    def columns(self) -> dict[str, str]:
        """The column names of the table, by role."""
        roles = _ROLES - {"label"} if self.findings else _ROLES
        columns = {role: str(getattr(self, role)) for role in sorted(roles)}
        return columns | {_FINDING + name: name for name in self.findings}

    def required(self, role: str) -> bool:
        """Return whether the table must have the column of ``role``."""
        return role in ("path", "label") or role.startswith(_FINDING)


# What the table says about a file. The patient is a pseudonym; match and site are sealed.
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("match", "label", "patient_key", "split", "site")]
)
SPARK_SCHEMA = from_arrow_schema(SCHEMA)


def match_key(path: str, match: Match) -> str:
    """Return the part of ``path`` that the source and the table are joined on."""
    if match == "path":
        return path
    name = posixpath.basename(path)
    return name if match == "name" else _stem(name)


def _stem(name: str) -> str:
    stem, ending = posixpath.splitext(name)
    return _stem(stem) if ending.lower() in _ENDINGS else name


class LabelTable:
    """A CSV, TSV or Parquet table of labels, with paths made relative to ``source``.

    Raises UsageError if the table cannot be read, lacks a column, holds an unknown split, or
    matches no file of the source.
    """

    def __init__(
        self, url: str, source: str, config: LabelConfig, *, follow_links: bool = False
    ) -> None:
        self._inside = None if follow_links else storage.normalise(source)
        self.url, self._source, self._config = url, storage.normalise(source), config
        if not storage.is_file(url):
            raise UsageError(f"There is no label table {url}.")
        is_parquet = url.lower().endswith((".parquet", ".pq"))
        self._first_row = 1 if is_parquet else 2  # below the header, as spreadsheets count
        self._dataset = self._open()
        self._columns = self._choose_columns()
        self._folder = self._base_folder()

    def write(self, url: str, pseudonyms: Pseudonyms) -> None:
        """Write the table as one Parquet file with the columns of SCHEMA."""
        system, path = storage.filesystem(url)
        with system.open(path, "wb") as file, pq.ParquetWriter(file, SCHEMA) as writer:
            first = self._first_row
            for batch in self._batches():
                writer.write_batch(self._normalised(batch, pseudonyms, first))
                first += batch.num_rows

    def _open(self) -> ds.Dataset:
        system, path = storage.filesystem(self.url)
        try:
            if path.lower().endswith((".parquet", ".pq")):
                return ds.dataset(path, filesystem=system, format="parquet")
            delimiter = "\t" if path.lower().endswith((".tsv", ".tab")) else ","
            names = self._config.columns.values()
            csv = ds.CsvFileFormat(
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                # Identifiers stay text: 007 is not 7.
                convert_options=pa.csv.ConvertOptions(
                    column_types={name: pa.string() for name in names}, strings_can_be_null=True
                ),
            )
            return ds.dataset(path, filesystem=system, format=csv)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UsageError:
        """Return an error that names the row; ``error``'s text may quote patient data."""
        match = re.search(r"Row #(\d+): (?:Expected (\d+) columns, got (\d+))?", str(error))
        if match is None:
            return UsageError(f"The label table {self.url} cannot be read: is it CSV or Parquet?")
        row, wanted, cells = match.groups()
        fault = f"has {cells} cells instead of {wanted}" if cells else "is not UTF-8 text"
        return UsageError(f"The label table {self.url} cannot be read: row {row} {fault}.")

    def _choose_columns(self) -> dict[str, str]:
        wanted = self._config.columns
        present = {
            role: name for role, name in wanted.items() if name in self._dataset.schema.names
        }
        for role in sorted(wanted.keys() - present.keys(), reverse=True):
            if self._config.required(role):
                key = "findings" if role.startswith(_FINDING) else role
                raise UsageError(
                    # Do not name the columns: without a header they are a patient's values.
                    f"The label table {self.url} has no column {wanted[role]!r} among its "
                    f"{len(self._dataset.schema.names)} (--label_table.{key} names it)."
                )
        for name in present.values():
            self._check_column(name)
        return present

    def _check_column(self, name: str) -> None:
        if self._dataset.schema.field(name).type.num_fields:
            raise UsageError(
                f"The column {name!r} of the label table {self.url} holds lists or records; a cell "
                "should be one value (--label_table.separator splits a text into several labels)."
            )

    def _batches(self) -> Iterator[pa.RecordBatch]:
        columns = {role: ds.field(name) for role, name in self._columns.items()}
        try:
            yield from self._dataset.to_batches(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def _paths(self) -> Iterator[str]:
        for batch in self._batches():
            yield from (str(path) for path in batch.column("path").to_pylist() if path)

    def _base_folder(self) -> str:
        """Return the folder that the table's paths are relative to: the source or the table's."""
        if self._config.match != "path":
            self._check_names()
            return self._source
        table_folder = posixpath.dirname(storage.normalise(self.url))
        paths = self._paths()
        for path in islice(paths, _PROBED_ROWS):
            for folder in (self._source, table_folder):
                relative = self._relative(path, folder)
                if relative and storage.is_file(storage.join(self._source, relative)):
                    return folder
        if next(paths, None) is None:
            raise self.no_match()
        return self._source

    def _check_names(self) -> None:
        match = self._config.match
        listed = {match_key(path, match) for path in self._paths()}
        below = islice(self._walk(), _PROBED_ROWS)
        first = next((path for path in below if match_key(path, match) in listed), None)
        if first is None and next(below, None) is None:
            raise self.no_match()

    def _walk(self) -> Iterator[str]:
        """Yield the paths of all files of the source, relative to it."""
        folders: Iterator[str] = iter([self._source])
        prefix = self._source + "/"
        while (folder := next(folders, None)) is not None:
            for entry in storage.children(folder, inside=self._inside):
                if entry.is_folder:
                    folders = chain(folders, [entry.path])
                else:
                    yield entry.path.removeprefix(prefix)

    def no_match(self) -> UsageError:
        """Return the error for a table of which no row names a file of the source."""
        return UsageError(
            f"The label table {self.url} matches no file below {self._source}; its paths should be "
            f"relative to that folder or to the table's (--label_table.match can compare names)."
        )

    def _relative(self, path: str, folder: str) -> str | None:
        """Return ``path`` relative to the source, or None if it is not below the source."""
        path = path.strip().replace("\\", "/")
        absolute = path if path.startswith("/") or "://" in path else storage.join(folder, path)
        scheme, separator, rest = absolute.partition("://")
        absolute = (
            scheme + separator + posixpath.normpath(rest)
            if separator
            else (posixpath.normpath(absolute))
        )
        inside = self._source + "/"
        return absolute[len(inside) :] if absolute.startswith(inside) else None

    def _normalised(
        self, batch: pa.RecordBatch, pseudonyms: Pseudonyms, first: int
    ) -> pa.RecordBatch:
        """Return the columns of SCHEMA; ``first`` is the number of the batch's first row."""
        patients = self._text(batch, "patient_id").to_pylist()
        keys = [None if patient is None else pseudonyms.patient(patient) for patient in patients]
        columns = {
            "match": _sealed(self._keys(batch.column("path").to_pylist()), pseudonyms),
            "label": self._labels(batch, first),
            "patient_key": pa.array(keys, pa.string()),
            "split": self._splits(self._text(batch, "split"), first),
            "site": _sealed(self._text(batch, "site").to_pylist(), pseudonyms),
        }
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=SCHEMA)

    def _text(self, batch: pa.RecordBatch, role: str) -> pa.Array:
        """Return a column as trimmed text; empty cells and absent columns are null."""
        if role not in self._columns:
            return pa.nulls(batch.num_rows, pa.string())
        try:
            text = pc.utf8_trim_whitespace(batch.column(role).cast(pa.string()))
        except pa.ArrowException:
            raise UsageError(
                f"The column {self._columns[role]!r} of the label table {self.url} is not text."
            ) from None
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)

    def _labels(self, batch: pa.RecordBatch, first: int) -> pa.Array:
        """Return the label of each row; findings are joined by join_findings."""
        config = self._config
        if not config.several:
            labels = self._text(batch, "label")
            check_length(pc.max(pc.utf8_length(labels)).as_py() or 0)
            return labels
        if config.findings:
            columns = [self._has(batch, name, first) for name in config.findings]
            listed = ([n for n, has in zip(config.findings, row, strict=True) if has]
                     for row in zip(*columns, strict=True))  # fmt: skip
        else:
            cells = self._text(batch, "label").to_pylist()
            listed = ((cell or "").split(config.separator) for cell in cells)
        return pa.array([self._joined(names, row) for row, names in enumerate(listed, first)])

    def _joined(self, names: Iterable[str], row: int) -> str:
        try:
            return join_findings(names, self._config.no_finding)
        except UsageError as error:
            raise UsageError(f"Row {row} of the label table {self.url}: {error}") from None

    def _has(self, batch: pa.RecordBatch, finding: str, first: int) -> list[bool]:
        present = _PRESENT | (_UNCERTAIN if self._config.uncertain == "present" else set())
        cells = pc.utf8_lower(self._text(batch, _FINDING + finding)).to_pylist()
        for row, cell in enumerate(cells, first):
            if cell not in _PRESENT | _UNCERTAIN | _ABSENT:
                raise UsageError(
                    f"Row {row} of the label table {self.url} has a bad value in the column "
                    f"{finding!r}: a finding is 1, 0, -1 or empty."
                )
        return [cell in present for cell in cells]

    def _keys(self, paths: Iterable[object]) -> Iterator[str | None]:
        for path in paths:
            if path is None:
                yield None
            elif self._config.match == "path":
                yield self._relative(str(path), self._folder)
            else:
                yield match_key(str(path).strip().replace("\\", "/"), self._config.match)

    def _splits(self, column: pa.Array, first: int) -> pa.Array:
        names = pc.utf8_lower(column).to_pylist()
        for row, name in enumerate(names, first):
            if name is not None and name not in SPLIT_NAMES:
                raise UsageError(
                    f"Row {row} of the label table {self.url} has a bad value in the column "
                    f"{self._config.split!r}: a split is train, val, test or empty."
                )
        return pa.array([SPLIT_NAMES.get(name) for name in names], pa.string())


def _sealed(cells: Iterable[str | None], pseudonyms: Pseudonyms) -> pa.Array:
    return pa.array(
        [None if cell is None else pseudonyms.seal(cell) for cell in cells], pa.string()
    )
