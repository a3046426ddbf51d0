"""The synthetic archive matches its summary, and is the same on every run and machine."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medspark.images import phantom
from medspark.images.decode import decode
from medspark.images.phantom import PhantomConfig, write_archive
from medspark.images.phantom.__main__ import main
from medspark.images.reasons import Unreadable
from medspark.images.rendering import Rendering

CONFIG = PhantomConfig(count=120, size=48, seed=5)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    write_archive(folder, CONFIG)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_archive(archive: Path, tmp_path: Path) -> None:
    write_archive(tmp_path, CONFIG)

    assert _files(tmp_path) == _files(archive)


def test_another_seed_gives_another_archive(archive: Path, tmp_path: Path) -> None:
    write_archive(tmp_path, CONFIG.model_copy(update={"seed": 6}))

    assert _files(tmp_path) != _files(archive)


def test_the_summary_is_the_answer_key_of_an_ingest(tmp_path: Path) -> None:
    summary = write_archive(tmp_path, CONFIG)

    labels = {row["path"] for row in csv.DictReader((tmp_path / "labels.csv").open())}
    digests: set[str] = set()
    duplicates, reasons = 0, Counter[str]()
    for path, data in _files(tmp_path).items():
        if path == "labels.csv":
            continue
        if path not in labels:
            reasons["no_label"] += 1
            continue
        try:
            (frame,) = decode(data, rendering=Rendering(size=16))
        except Unreadable as unreadable:
            reasons[unreadable.reason.value] += 1
            continue
        duplicates += frame.pixel_sha256 in digests
        digests.add(frame.pixel_sha256)

    assert len(digests) == summary.images == 120
    assert duplicates == summary.duplicates > 0
    assert reasons == summary.quarantine_reasons
    assert summary.files == len(_files(tmp_path)) - 1
    assert summary.files == summary.images + summary.duplicates + sum(reasons.values())


def test_every_syntax_depth_and_polarity_occurs(archive: Path) -> None:
    seen: set[object] = set()
    for path, data in _files(archive).items():
        if path.startswith("site-"):
            attributes = next(decode(data, rendering=Rendering(size=16))).attributes
            seen |= {attributes.transfer_syntax, attributes.bits_stored, attributes.photometric}

    syntaxes = {str(uid) for uid in phantom.SYNTAXES.values() if uid}
    assert seen >= syntaxes | {8, 12, 16, "MONOCHROME1", "MONOCHROME2"}


def test_every_dicom_file_carries_planted_identifiers(archive: Path) -> None:
    for path, data in _files(archive).items():
        if path.startswith("site-") and data[128:132] == b"DICM" and b"1.2.1.99" not in data[:400]:
            assert data.count(phantom.CANARY.encode()) >= 8


def test_patients_have_several_images_of_one_class_and_site() -> None:
    studies = list(phantom.plan(PhantomConfig(count=400)))
    patients = {study.patient.number for study in studies}

    assert len({(s.patient.number, s.patient.label, s.patient.site) for s in studies}) == len(
        patients
    )
    assert 120 < len(patients) < 250
    assert {study.patient.site for study in studies} == {"a", "b", "c"}


def test_the_format_of_a_file_does_not_tell_its_class() -> None:
    studies = list(phantom.plan(PhantomConfig(count=4000)))
    for trait in ("syntax", "bits", "inverted"):
        groups: dict[object, list[int]] = {}
        for study in studies:
            groups.setdefault(getattr(study, trait), []).append(study.patient.label)
        shares = [float(np.mean(labels)) for labels in groups.values()]
        assert max(shares) - min(shares) < 0.12


def test_more_contrast_changes_the_images_of_one_class_only() -> None:
    faint = PhantomConfig(count=20, size=32, contrast=0.1)
    strong = faint.model_copy(update={"contrast": 0.5})

    for study in phantom.plan(faint):
        same = np.array_equal(phantom.radiograph(study, faint), phantom.radiograph(study, strong))
        assert same == (study.patient.label == 0)


@pytest.mark.parametrize("size", [32, 100, 300])
def test_an_image_has_the_size_that_was_asked_for(size: int) -> None:
    config = PhantomConfig(count=1, size=size)
    (study,) = phantom.plan(config)

    image = phantom.radiograph(study, config)

    assert image.shape == (size, size)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1


def test_the_command_line_writes_what_it_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{tmp_path} --count 5 --size 40 --syntaxes jpeg_2000 --bits 16 --no-extras"

    assert main(words.split()) == 0

    summary = json.loads(capsys.readouterr().out)
    assert (summary["files"], summary["images"]) == (5, 5)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "labels.csv":
            assert next(decode(path, rendering=Rendering(size=16))).attributes.bits_stored == 16


def test_an_archive_is_not_made_among_files_of_others(tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("theirs")

    assert main([str(tmp_path), "--count", "10"]) == 2

    assert "not medspark's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


def test_a_portable_image_shows_the_same_patient_within_a_tilted_field_and_with_a_marker() -> None:
    usual = PhantomConfig(count=12, size=64)
    portable = usual.model_copy(update={"style": "portable"})

    for study in phantom.plan(usual):
        plain, marked = (phantom.radiograph(study, config) for config in (usual, portable))
        middle = slice(20, 44), slice(20, 44)
        assert np.corrcoef(plain[middle].ravel(), marked[middle].ravel())[0, 1] > 0.9
        assert marked[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.2
        assert marked[4:20, 44:60].max() > 0.9


def test_an_unknown_style_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "archive"), "--style", "inverted"])

    assert "portable" in capsys.readouterr().err
