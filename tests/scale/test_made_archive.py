"""The files that make scale writes are valid DICOM, each with an image and a patient of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_archive import SIDE, path_of, write
from pydicom import dcmread
from pydicom.uid import UID

from medspark.images.decode import decode
from medspark.images.deidentify import Pseudonyms
from medspark.images.limits import Limits
from medspark.images.rendering import Rendering


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write(folder, 990, 1040, processes=1)
    return folder


def test_every_file_reads_back_with_its_own_identifiers(archive):
    files = [dcmread(archive / path_of(number)) for number in range(990, 1040)]

    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        values = {str(file[name].value) for file in files}
        assert len(values) == 50
        assert all(UID(value).is_valid for value in values)
    assert all(file.file_meta.MediaStorageSOPInstanceUID == file.SOPInstanceUID for file in files)
    assert (
        len({file.PatientID for file in files}) == len({file.PatientName for file in files}) == 25
    )


def test_every_image_is_another_and_decodes(archive):
    made = {
        frame.pixel_sha256: frame
        for number in range(990, 1040)
        for frame in decode(
            (archive / path_of(number)).read_bytes(),
            rendering=Rendering(size=SIDE),
            limits=Limits(),
            pseudonyms=Pseudonyms(bytes(32)),
        )
    }

    assert len(made) == 50
    assert len({frame.attributes.patient_key for frame in made.values()}) == 25
    assert {frame.pixels.shape for frame in made.values()} == {(SIDE, SIDE)}


def test_a_patient_has_one_class_and_a_folder_a_thousand_files_at_most():
    paths = [Path(path_of(number)) for number in range(4000)]

    assert all(paths[n].parts[0] == paths[n + 1].parts[0] for n in range(0, 4000, 2))
    assert len({path.parts[0] for path in paths}) == 2
    folders = [path.parent for path in paths]
    assert max(map(folders.count, set(folders))) <= 1000


def test_what_is_written_again_is_the_same(archive, tmp_path):
    write(tmp_path, 1000, 1010, processes=1)

    for number in range(1000, 1010):
        path = path_of(number)
        assert (tmp_path / path).read_bytes() == (archive / path).read_bytes()
