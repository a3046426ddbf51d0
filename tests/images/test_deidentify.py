"""De-identification: only allow-listed values of a header are stored."""

from __future__ import annotations

import hashlib
import logging
import stat
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st
from pydicom.datadict import DicomDictionary, keyword_dict
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medspark.errors import UsageError
from medspark.images.decode import decode
from medspark.images.deidentify import (
    Privacy,
    Pseudonyms,
    check_burned_in,
    coarse_spacing,
    load_key,
)
from medspark.images.frame import Frame
from medspark.images.header import clean
from medspark.images.reasons import Unreadable
from medspark.images.rendering import Rendering

MakeDicom = Callable[..., bytes]

KEY = b"0123456789abcdef"
IMAGE = np.arange(256, dtype=np.uint16).reshape(16, 16)
MARKER = "ZQXCANARY"

# Text representations (PS3.5 6.2) and a value of each that carries the marker.
_MARKED = {
    "AE": MARKER, "AS": "045Y", "CS": MARKER, "DA": "19870605", "DT": "19870605121212",
    "LO": MARKER, "LT": MARKER, "PN": f"{MARKER}^A", "SH": MARKER, "ST": MARKER,
    "TM": "121212.987654", "UC": MARKER, "UI": "1.2.987654321.1", "UR": f"http://{MARKER}",
    "UT": MARKER,
}  # fmt: skip
_SECRETS = (MARKER, "987654", "19870605", "1987-06-05")


def decoded(data: bytes, **settings: Any) -> Frame:
    settings.setdefault("pseudonyms", Pseudonyms(KEY))
    return next(decode(data, rendering=Rendering(size=16), **settings))


def _fill(data: Dataset) -> int:
    """Put a marker into every text element of the dictionary (PS3.6), and return how many."""
    filled = 0
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        known = keyword in data or not keyword or tag >> 16 in (0x0002, 0x0004, 0x0000)
        if vr in _MARKED and not known and not retired and keyword not in _NEEDED:
            setattr(data, keyword, _MARKED[vr])
            filled += 1
    return filled


_NEEDED = {"PhotometricInterpretation", "SpecificCharacterSet", "BurnedInAnnotation"}


def _plant(data: Dataset) -> None:
    assert _fill(data) > 1000
    nested = Dataset()
    _fill(nested)
    data.RequestAttributesSequence = Sequence([nested])
    for target, group in ((data, 0x0011), (nested, 0x0013)):
        block = target.private_block(group, f"{MARKER} CREATOR", create=True)
        block.add_new(0x01, "LO", f"{MARKER} private")
        block.add_new(0x02, "OB", MARKER.encode())
        block.add_new(0x03, "SQ", [nested] if target is data else [])
    data.add_new(0x60003000, "OW", (MARKER + "!").encode())  # overlay
    data.add_new(0x60000022, "LO", MARKER)
    data.IconImageSequence = Sequence([nested])


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.filterwarnings("ignore:The value length")
def test_no_marker_of_any_text_element_survives(
    dicom: MakeDicom, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(dicom(IMAGE, prepare=_plant))
    data[: len(MARKER)] = MARKER.encode()  # the preamble is no place to hide either
    assert data.count(MARKER.encode()) > 1000

    with caplog.at_level(logging.DEBUG):
        frame = decoded(bytes(data))

    printed = capfd.readouterr()
    everything = f"{frame!r} {frame.attributes!r} {frame.rendered!r} {caplog.text} {printed}"
    assert [secret for secret in _SECRETS if secret in everything] == []
    assert frame.attributes.patient_key
    assert frame.attributes.age_years == 45


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize("keyword", ["Rows", "BitsAllocated", "WindowCenter", "NumberOfFrames"])
def test_a_message_does_not_quote_a_wrong_value(dicom: MakeDicom, keyword: str) -> None:
    def spoil(data: Dataset) -> None:
        data.pop(keyword, None)
        data.add_new(keyword_dict[keyword], "LO", f"{MARKER}\\{MARKER}")

    data = dicom(IMAGE, prepare=spoil)

    try:
        said = repr(decoded(data))
    except Unreadable as unreadable:
        said = f"{unreadable} {unreadable.__cause__} {unreadable.args}"
    assert MARKER not in said


def test_what_pydicom_says_about_a_wrong_value_is_not_heard(
    dicom: MakeDicom, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(data: Dataset) -> None:
        data.PatientID = "A1\u00e9"
        data.SpecificCharacterSet = "ISO_IR 100"

    data = dicom(IMAGE, prepare=spoil).replace(b"ISO_IR 100", MARKER.encode() + b" ")

    with caplog.at_level(logging.DEBUG):
        frame = decoded(data)

    assert frame.attributes.patient_key
    assert caplog.text == ""


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_coded_values_are_kept_and_free_text_in_their_place_is_not(dicom: MakeDicom) -> None:
    good = decoded(dicom(IMAGE, Modality="CR", BodyPartExamined="chest", ViewPosition="PA"))
    bad = decoded(dicom(IMAGE, Modality="JOHN", BodyPartExamined="JOHN DOE", ViewPosition="DOE"))

    assert (good.attributes.modality, good.attributes.body_part) == ("CR", "CHEST")
    assert good.attributes.view_position == "PA"
    assert (bad.attributes.modality, bad.attributes.body_part) == (None, None)
    assert bad.attributes.view_position is None


def test_a_manufacturer_is_one_of_a_list(dicom: MakeDicom) -> None:
    named = decoded(dicom(IMAGE, Manufacturer="Philips Medical Systems, Dr Doe's"))
    other = decoded(dicom(IMAGE, Manufacturer="Doe's garage"))

    assert (named.attributes.manufacturer, other.attributes.manufacturer) == ("PHILIPS", None)


@pytest.mark.parametrize(
    ("elements", "age"),
    [
        ({"PatientAge": "045Y"}, 45),
        ({"PatientAge": "101Y"}, 90),
        ({"PatientAge": "018M"}, 1),
        ({"PatientAge": "007D"}, 0),
        ({"PatientBirthDate": "19500615", "StudyDate": "20200614"}, 69),
        ({"PatientBirthDate": "19000101", "StudyDate": "20200614"}, 90),
        ({"PatientBirthDate": "20300101", "StudyDate": "20200614"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_an_age_is_whole_years_and_ends_at_ninety(
    dicom: MakeDicom, elements: dict[str, str], age: int | None
) -> None:
    assert decoded(dicom(IMAGE, **elements)).attributes.age_years == age


# --- pseudonyms -------------------------------------------------------------------------------


@given(value=st.text(min_size=1), other=st.binary(min_size=16))
def test_a_pseudonym_depends_on_the_key_and_the_kind_of_id(value: str, other: bytes) -> None:
    names = Pseudonyms(KEY)

    assert names.patient(value) == Pseudonyms(KEY).patient(value)
    assert len(names.patient(value)) == 32
    assert len({names.patient(value), names.study(value), names.series(value)}) == 3
    assert (names.patient(value) == Pseudonyms(other).patient(value)) == (other == KEY)


def test_padding_does_not_make_another_patient() -> None:
    names = Pseudonyms(KEY)

    assert names.patient("A1 ") == names.patient("A1\0") == names.patient("A1")


def test_a_domain_cannot_pose_as_another() -> None:
    names = Pseudonyms(KEY)

    assert names.name("a", "b:c") != names.name("a:b", "c")


@given(patient=st.text(), days=st.integers(0, 5000))
def test_the_distance_between_two_dates_of_a_patient_is_kept(patient: str, days: int) -> None:
    names, first = Pseudonyms(KEY), date(2001, 2, 3)
    later = date.fromordinal(first.toordinal() + days)

    moved = names.relative_day(patient, first)

    assert names.relative_day(patient, later) - moved == days
    assert abs(moved - first.toordinal()) <= 365


def test_different_patients_are_moved_differently() -> None:
    names = Pseudonyms(KEY)

    assert len({names.relative_day(str(n), date(2001, 2, 3)) for n in range(100)}) > 80


@given(st.lists(st.text(), min_size=2, unique=True))
def test_what_is_sealed_comes_back_and_only_with_the_key(values: list[str]) -> None:
    names, other = Pseudonyms(KEY), Pseudonyms(b"another" + KEY)

    sealed = [names.seal(value) for value in values]

    assert [names.unseal(value) for value in sealed] == values
    assert len(set(sealed)) == len(values)
    assert sealed == [Pseudonyms(KEY).seal(value) for value in values]
    with pytest.raises(InvalidTag):
        other.unseal(sealed[0])


@given(site=st.text(min_size=1), others=st.lists(st.text(min_size=1)))
def test_a_site_is_a_pseudonym_unless_it_is_allowed_by_name(site: str, others: list[str]) -> None:
    names = Pseudonyms(KEY)
    others = [other for other in others if other != site]

    assert Privacy(sites=(*others, site)).site(site, names) == site
    assert Privacy(sites=tuple(others)).site(site, names) == names.name("site", clean(site)) != site


@pytest.mark.parametrize(
    ("spacing", "kept"),
    [("0.1234567891", 0.123), ("0.6835937500", 0.684), ("12.3456789012", 12.3), ("0.2", 0.2)],
)
def test_a_spacing_has_three_digits_which_a_scanner_has_and_no_one_image(
    dicom: MakeDicom, spacing: str, kept: float
) -> None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        found = decoded(dicom(IMAGE, **{keyword: [spacing, "0.3000000001"]})).attributes

        assert (found.row_spacing_mm, found.column_spacing_mm) == (kept, 0.3)
        assert found.spacing_source == keyword


@given(st.floats(1e-4, 1e4))
def test_a_coarse_spacing_is_within_half_a_percent(spacing: float) -> None:
    coarse = coarse_spacing(spacing)

    assert abs(coarse / spacing - 1) <= 0.005
    assert float(f"{coarse:.2e}") == coarse


def test_without_a_patient_id_the_study_stands_for_the_person(dicom: MakeDicom) -> None:
    study = {"StudyInstanceUID": "1.2.3"}
    one, two = decoded(dicom(IMAGE, **study)), decoded(dicom(IMAGE + 1, **study))
    none = decoded(dicom(IMAGE))

    assert one.attributes.patient_key == two.attributes.patient_key != None  # noqa: E711
    assert none.attributes.patient_key is None


def test_without_a_key_there_are_no_pseudonyms(dicom: MakeDicom) -> None:
    attributes = decoded(
        dicom(IMAGE, PatientID="A1", StudyDate="20200101"), pseudonyms=None
    ).attributes

    assert attributes.patient_key is attributes.study_key is attributes.relative_day is None


def test_the_key_is_not_shown() -> None:
    assert KEY.decode() not in repr(Pseudonyms(KEY))


# --- the key ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_key_is_made_once_for_its_owner_alone_and_said(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_key(Privacy(), dataset="/data/samples")
    second = load_key(Privacy(), dataset="/data/samples")

    (path,) = (home / ".medspark" / "keys").iterdir()
    assert first == second
    assert len(first) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [str(path) in message for message in caplog.messages] == [True]
    assert first.hex() not in caplog.text


@pytest.mark.usefixtures("home")
def test_each_dataset_has_its_own_key() -> None:
    assert load_key(Privacy(), dataset="/a") != load_key(Privacy(), dataset="/b")


def test_a_dataset_that_is_there_gets_no_second_key(home: Path) -> None:
    with pytest.raises(UsageError, match=r"The pseudonym key of /a is not at \S+: name it"):
        load_key(Privacy(), dataset="/a", new=False)

    assert not home.exists()
    made = load_key(Privacy(), dataset="/a")
    assert load_key(Privacy(), dataset="/a", new=False) == made


RANDOM = hashlib.sha256(KEY).digest()[:16]


@pytest.mark.parametrize("content", [RANDOM, RANDOM.hex().encode() + b"\n"], ids=["raw", "hex"])
def test_a_key_file_is_raw_or_hexadecimal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(content)

    assert load_key(Privacy(key_file=path), dataset="s3a://bucket/samples") == RANDOM


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("none", None, "cannot be read"), ("short", b"abc", "16 bytes"), ("in/key", KEY, "inside")],
)
def test_a_key_file_that_will_not_do_is_named(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UsageError, match=said) as caught:
        load_key(Privacy(key_file=path), dataset=str(tmp_path / "in"))

    assert str(path) in str(caught.value)


# --- burned-in text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "flagged", "suspected"),
    [
        ({"BurnedInAnnotation": "YES"}, True, True),
        ({"BurnedInAnnotation": "NO", "Modality": "US"}, False, False),
        ({"Modality": "US"}, False, True),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, False, True),
        ({"ConversionType": "WSD"}, False, True),
        ({"Modality": "CR", "ImageType": ["ORIGINAL", "PRIMARY"]}, False, False),
    ],
    ids=str,
)
def test_burned_in_text_is_refused_by_rule(
    elements: dict[str, Any], flagged: bool, suspected: bool
) -> None:
    header = Dataset()
    for keyword, value in elements.items():
        setattr(header, keyword, value)

    assert _refused(header, Privacy()) == flagged
    assert _refused(header, Privacy(burned_in="suspected")) == suspected
    assert not _refused(header, Privacy(burned_in="ignore"))


def _refused(header: Dataset, privacy: Privacy) -> bool:
    try:
        check_burned_in(header, privacy)
    except Unreadable:
        return True
    return False
