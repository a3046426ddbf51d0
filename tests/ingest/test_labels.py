"""Label tables and class folders in their common forms."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.errors import UsageError
from medspark.images.deidentify import Pseudonyms
from medspark.ingest.label_table import LabelConfig, LabelTable, match_key
from medspark.ingest.labels import (
    LONGEST_NAME,
    coded_attribute,
    from_folders,
    has_class_folders,
    join_findings,
)

PSEUDONYMS = Pseudonyms(b"k" * 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("images/one.dcm", "images/two.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def rows(table: LabelTable, folder: Path) -> list[dict[str, str]]:
    table.write(str(folder / "out.parquet"), PSEUDONYMS)
    found = pq.read_table(folder / "out.parquet").to_pylist()
    return [row | {"match": row["match"] and PSEUDONYMS.unseal(row["match"])} for row in found]


def write(folder: Path, text: str, name: str = "labels.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    ("path", "label", "split"),
    [
        ("NORMAL/x.png", "NORMAL", None),
        ("NORMAL/deeper/x.png", "NORMAL", None),
        ("train/NORMAL/x.png", "NORMAL", "train"),
        ("data/Test/SICK/x.png", "SICK", "test"),
        ("valid/SICK/x.png", "SICK", "val"),
        ("train/NORMAL/deeper/x.png", "NORMAL", "train"),
        ("NORMAL/train/SICK/x.png", "SICK", "train"),
        ("train/val/x.png", "val", "train"),
        ("train/x.png", None, "train"),
        ("NORMAL/test.png", "NORMAL", None),
        ("x.png", None, None),
    ],
)
def test_folders_name_the_class_and_the_split(path, label, split):
    assert from_folders(path) == (label, split)


def test_a_table_keeps_identifiers_as_text_and_patients_as_pseudonyms(source):
    url = write(source, "path,label,patient_id,split\nimages/one.dcm, 1 ,007,Training\n")

    (row,) = rows(LabelTable(url, str(source), LabelConfig()), source)

    assert row == {
        "match": "images/one.dcm",
        "label": "1",
        "patient_key": PSEUDONYMS.patient("007"),
        "split": "train",
        "site": None,
    }
    assert b"007" not in (source / "out.parquet").read_bytes()


@pytest.mark.parametrize("prefix", ["", "./", "/abs/", "images\\"])
def test_paths_may_be_relative_to_the_table_or_whole(source, prefix):
    whole = {"/abs/": f"{source}/images/one.dcm", "images\\": "images\\one.dcm"}
    url = write(source, f"path,label\n{whole.get(prefix, prefix + 'images/one.dcm')},A\n")

    (row,) = rows(LabelTable(url, str(source / "images"), LabelConfig()), source)

    assert row["match"] == "one.dcm"


@pytest.mark.parametrize(("match", "path"), [("name", "elsewhere/one.dcm"), ("stem", "one")])
def test_files_can_be_matched_by_less_than_their_path(source, match, path):
    url = write(source, f"path,label\n{path},A\n")

    (row,) = rows(LabelTable(url, str(source), LabelConfig(match=match)), source)

    assert row["match"] == match_key("images/one.dcm", match)


UIDS = st.lists(st.integers(0, 999).map(str), min_size=2, max_size=6).map(".".join)
ENDINGS = st.lists(
    st.sampled_from([".dcm", ".DCM", ".dicom", ".png", ".Jpeg", ".tif", ".nii", ".gz"]), max_size=3
).map("".join)


@given(UIDS, ENDINGS)
def test_a_stem_is_the_name_without_the_endings_of_image_files(uid, endings):
    assert match_key(f"some.folder/{uid}{endings}", "stem") == uid
    assert match_key(uid, "stem") == uid


@pytest.mark.parametrize("name", ["scan.v2", "x.unknown", ".dcm", "1.2.840.10008.1", "a.dcm.v3"])
def test_what_is_no_known_ending_belongs_to_the_stem(name):
    assert match_key(name, "stem") == name
    assert match_key(f"{name}.png", "stem") == name


def test_files_that_are_named_by_uids_are_told_apart_by_their_stems(source):
    for last in (1, 2):
        (source / f"1.2.840.{last}.dcm").write_bytes(b"")
    url = write(source, "path,label\n1.2.840.1,A\n1.2.840.2.dcm.gz,B\n")

    found = rows(LabelTable(url, str(source), LabelConfig(match="stem")), source)

    assert [row["match"] for row in found] == ["1.2.840.1", "1.2.840.2"]


def test_names_are_not_looked_for_behind_links_out_of_the_source(source, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "far.dcm").write_bytes(b"")
    (source / "link").symlink_to(other)
    url, config = write(source, "path,label\nfar.dcm,A\n"), LabelConfig(match="name")

    LabelTable(url, str(source), config, follow_links=True)
    with pytest.raises(UsageError, match="matches no file"):
        LabelTable(url, str(source), config)


NESTED = {
    "a list": pa.array([["A"]]),
    "a list of one size": pa.array([["A"]], pa.list_(pa.string(), 1)),
    "a record": pa.array([{"name": "A"}]),
    "a map": pa.array([[("A", 1)]], pa.map_(pa.string(), pa.int8())),
    "bytes that are no text": pa.array([b"\xff"]),
}


@pytest.mark.parametrize("cell", NESTED)
@pytest.mark.parametrize("column", ["label", "patient_id", "site"])
def test_a_cell_that_is_not_one_value_is_refused_by_its_column(source, cell, column):
    table = {"path": ["images/one.dcm"], "label": ["A"]} | {column: NESTED[cell]}
    pq.write_table(pa.table(table), source / "t.parquet")

    said = "is not text" if cell.startswith("bytes") else "holds lists or records"
    with pytest.raises(UsageError, match=f"The column '{column}' of the label table .* {said}"):
        rows(LabelTable(str(source / "t.parquet"), str(source), LabelConfig()), source)


@pytest.mark.parametrize("separator", [None, ";"])
def test_a_label_longer_than_any_diagnosis_is_refused_and_not_quoted(source, separator):
    config, longest = LabelConfig(separator=separator), "ä" * LONGEST_NAME
    url = write(source, f"path,label\nimages/one.dcm,{longest}\n")
    assert rows(LabelTable(url, str(source), config), source)[0]["label"] == longest

    url = write(source, f"path,label\nimages/one.dcm,{longest}ä\n")
    with pytest.raises(UsageError, match=r"A label has 129 characters, .* at most 128") as raised:
        rows(LabelTable(url, str(source), config), source)
    assert "ää" not in str(raised.value)


def test_several_short_findings_may_be_long_together(source):
    findings = ";".join(f"finding {number:02d}" for number in range(30))
    url = write(source, f"path,label\nimages/one.dcm,{findings}\n")

    (row,) = rows(LabelTable(url, str(source), FINDINGS_BY_SEMICOLON), source)

    assert row["label"] == findings.replace(";", "|")


def test_a_parquet_table_and_columns_of_other_names_are_read(source):
    table = pa.table({"Image Index": ["images/two.dcm"], "finding": [3]})
    pq.write_table(table, source / "t.parquet")
    config = LabelConfig(path="Image Index", label="finding")

    (row,) = rows(LabelTable(str(source / "t.parquet"), str(source), config), source)

    assert (row["match"], row["label"]) == ("images/two.dcm", "3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\nimages/three.dcm,A\n", "matches no file"),
        ("path,class\nimages/one.dcm,A\n", "no column 'label' among its 2 "),
        (
            "path,label,split\nimages/one.dcm,A,holdout\n",
            "Row 2 of .* a bad value in the column 'split': a split is",
        ),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(source, text, said):
    with pytest.raises(UsageError, match=said):
        rows(LabelTable(write(source, text), str(source), LabelConfig()), source)


@pytest.mark.parametrize("match", ["name", "stem"])
def test_a_table_that_matches_no_name_is_refused(source, match):
    url = write(source, "path,label\nthree.dcm,A\n")

    with pytest.raises(UsageError, match="matches no file"):
        LabelTable(url, str(source), LabelConfig(match=match))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no label table .*nothing\.csv"):
        LabelTable(str(tmp_path / "nothing.csv"), str(tmp_path), LabelConfig())


def test_only_coded_attributes_can_be_labels():
    assert coded_attribute("Modality") == "modality"
    with pytest.raises(UsageError, match="PatientName"):
        coded_attribute("PatientName")


FINDINGS = LabelConfig(separator="|")
FINDINGS_BY_SEMICOLON = LabelConfig(separator=";")


@given(st.permutations(["Effusion", "Cardiomegaly", " No Finding ", "", "Effusion "]))
def test_findings_are_the_same_in_whatever_order_they_are_told(names):
    assert join_findings(names, "No Finding") == "Cardiomegaly|Effusion"


def test_no_finding_and_an_empty_cell_say_the_same_and_a_missing_row_says_nothing(source):
    (source / "images/three.dcm").write_bytes(b"")
    text = "path,label\nimages/one.dcm,\nimages/two.dcm,No Finding\nimages/three.dcm,b|a\n"

    found = rows(LabelTable(write(source, text), str(source), FINDINGS), source)

    assert [row["label"] for row in found] == ["", "", "a|b"]


def test_the_separator_and_the_name_of_no_finding_can_be_others(source):
    url = write(source, 'path,label\nimages/one.dcm,"b, a"\nimages/two.dcm,none\n')
    config = LabelConfig(separator=",", no_finding="none")

    found = rows(LabelTable(url, str(source), config), source)

    assert [row["label"] for row in found] == ["a|b", ""]


def test_a_finding_whose_name_would_fall_apart_is_refused(source):
    url = write(source, 'path,label\nimages/one.dcm,"b;a|c"\n')

    with pytest.raises(UsageError, match=r"Row 2 of .* holds \|, which"):
        rows(LabelTable(url, str(source), LabelConfig(separator=";")), source)


@pytest.mark.parametrize("uncertain", ["absent", "present"])
def test_findings_may_have_columns_of_their_own(source, uncertain):
    text = (
        "path,Edema,Pleural Other,No Finding\nimages/one.dcm,1.0,-1.0,\nimages/two.dcm,0.0,,1.0\n"
    )
    config = LabelConfig(findings=("Pleural Other", "Edema"), uncertain=uncertain)

    found = rows(LabelTable(write(source, text), str(source), config), source)

    both = "Edema|Pleural Other"
    assert [row["label"] for row in found] == [both if uncertain == "present" else "Edema", ""]


@pytest.mark.parametrize("uncertain", ["absent", "present"])
def test_a_finding_is_there_however_that_is_written(source, uncertain):
    cells = {"1": 1, "1.0": 1, "TRUE": 1, " true ": 1, "0": 0, "0.0": 0, "False": 0, "": 0}
    cells |= dict.fromkeys(("-1", "-1.0"), int(uncertain == "present"))
    text = "path,A,B\n" + "".join(f"images/one.dcm,{cell},1\n" for cell in cells)
    config = LabelConfig(findings=("A", "B"), uncertain=uncertain)

    found = rows(LabelTable(write(source, text), str(source), config), source)

    assert [row["label"] == "A|B" for row in found] == [bool(there) for there in cells.values()]


@pytest.mark.parametrize(
    ("told", "split"),
    [
        ("train", "train"), (" Training", "train"), ("VAL", "val"), ("valid", "val"),
        ("validation", "val"), ("dev", "val"), ("test", "test"), ("Testing", "test"), ("", None),
    ],
)  # fmt: skip
def test_a_split_has_many_names(source, told, split):
    url = write(source, f"path,label,split\nimages/one.dcm,A,{told}\n")

    (row,) = rows(LabelTable(url, str(source), LabelConfig()), source)

    assert row["split"] == split
    if told.strip():
        assert from_folders(f"{told.strip()}/A/x.png") == ("A", split)


def test_paths_that_leave_the_source_match_nothing(source):
    (source / "images-of-others").mkdir()
    (source / "images-of-others" / "x.dcm").write_bytes(b"")
    inside = ("one.dcm", "deep/../two.dcm", f"{source}/images/one.dcm", f"{source}//images/two.dcm")
    outside = ("../images-of-others/x.dcm", f"{source}/images-of-others/x.dcm", "/one.dcm")
    text = "path,label\n" + "".join(f"{path},A\n" for path in (*inside, *outside))

    found = rows(LabelTable(write(source, text), str(source / "images"), LabelConfig()), source)

    matches = [row["match"] for row in found]
    assert matches == ["one.dcm", "two.dcm", "one.dcm", "two.dcm", None, None, None]


def test_an_empty_cell_says_nothing(source):
    text = 'path,label,patient_id,split,site\nimages/one.dcm,,"  ",,\nimages/two.dcm," ",,"",\n'

    for row in rows(LabelTable(write(source, text), str(source), LabelConfig()), source):
        assert {row[name] for name in ("label", "patient_key", "split", "site")} == {None}


def test_a_tab_separates_the_columns_of_a_tsv(source):
    url = write(source, "path\tlabel\nimages/one.dcm\tA,B\n", name="labels.tsv")

    (row,) = rows(LabelTable(url, str(source), LabelConfig()), source)

    assert (row["match"], row["label"]) == ("images/one.dcm", "A,B")


def test_a_source_without_folders_has_no_classes(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    assert not has_class_folders(str(tmp_path))

    (tmp_path / "A").mkdir()
    assert has_class_folders(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "path,Edema\nimages/one.dcm,1\n",
            "no column 'Nodule' among its 2 .*--label_table.findings",
        ),
        (
            "path,Edema,Nodule\nimages/one.dcm,1,maybe\n",
            "Row 2 of .* a bad value in the column 'Nodule': a finding is",
        ),
    ],
)
def test_columns_of_findings_that_cannot_be_meant_are_refused(source, text, said):
    config = LabelConfig(findings=("Edema", "Nodule"))

    with pytest.raises(UsageError, match=said):
        rows(LabelTable(write(source, text), str(source), config), source)


NAME = "DOE^JANE"


@pytest.mark.parametrize(
    ("text", "config", "said"),
    [
        (f"path,label\nimages/one.dcm,A\nimages/two.dcm,{NAME},A\n", {}, "row 3 has 3 cells"),
        (f"path,label\nimages/one.dcm,\udcff{NAME}\n", {}, "row 2 is not UTF-8 text"),
        (f"{NAME}.dcm,A\nimages/two.dcm,B\n", {}, "among its 2"),
        (f"path,label,split\nimages/one.dcm,A,val\nimages/two.dcm,A,{NAME}\n", {}, "Row 3 of"),
        (f"path,E\nimages/one.dcm,0\nimages/two.dcm,{NAME}\n", {"findings": ("E",)}, "Row 3 of"),
        (f'path,label\nimages/one.dcm,A\nimages/two.dcm,"{NAME}|x;y"\n', {"separator": ";"},
         "Row 3 of"),
    ],
)  # fmt: skip
def test_an_error_says_where_a_cell_is_and_never_what_it_says(source, text, config, said):
    (source / "labels.csv").write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(UsageError, match=said) as caught:
        rows(LabelTable(f"{source}/labels.csv", str(source), LabelConfig(**config)), source)

    assert NAME not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_rows_are_counted_over_the_batches_of_a_long_table(source):
    lines = ["path,label,split", *["images/one.dcm,A,val"] * 70_000, f"images/two.dcm,A,{NAME}"]
    table = LabelTable(write(source, "\n".join(lines)), str(source), LabelConfig())

    with pytest.raises(UsageError, match="Row 70002 of"):
        rows(table, source)


def test_what_a_task_reads_of_a_table_names_no_file_patient_or_site(source):
    url = write(source, f"path,label,patient_id,site\nimages/one.dcm,A,{NAME},{NAME} Clinic\n")

    (row,) = rows(LabelTable(url, str(source), LabelConfig()), source)

    stored = repr(pq.read_table(source / "out.parquet").to_pylist())
    assert NAME not in stored
    assert "one.dcm" not in stored
    assert PSEUDONYMS.unseal(row["site"]) == f"{NAME} Clinic"
