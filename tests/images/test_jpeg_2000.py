"""JPEG 2000 of every depth and sign, decoded exactly by OpenJPEG 2.5."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from openjpeg.utils import encode_array
from pydicom import uid
from pydicom.encaps import encapsulate
from stored_values import stored_frames

from medspark.images.codestream import read_codestream
from medspark.images.decode import decode
from medspark.images.limits import Limits
from medspark.images.rendering import Rendering

MakeDicom = Callable[..., bytes]
Array = npt.NDArray[Any]


def _stored(data: bytes) -> Array:
    (found,) = stored_frames(io.BytesIO(data), len(data), limits=Limits())
    return found


def _file(dicom: MakeDicom, values: Array, bits: int, *, signed: bool | None = None) -> bytes:
    """Return a lossless file of ``values``; ``signed`` is the sign in its header."""
    stream = encode_array(
        values, bits_stored=bits, photometric_interpretation=1 if values.ndim == 3 else 2
    )
    header = read_codestream(stream)
    assert header is not None
    assert (header.signed, header.precision) == (values.dtype.kind == "i", bits)
    said = values if signed is None else values.view(f"{'iu'[not signed]}{values.dtype.itemsize}")
    return dicom(
        said, syntax=uid.JPEG2000Lossless, pixel_data=encapsulate([stream]), BitsStored=bits
    )


@given(bits=st.integers(2, 16), signed=st.booleans(), colour=st.booleans(), seed=st.integers(0, 99))
def test_every_depth_and_sign_keeps_its_values(
    dicom: MakeDicom, bits: int, signed: bool, colour: bool, seed: int
) -> None:
    dtype = np.dtype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")
    low = -(1 << (bits - 1)) if signed else 0
    shape = (65, 71, 3) if colour else (65, 71)
    values = np.random.default_rng(seed).integers(low, low + (1 << bits), shape).astype(dtype)

    assert np.array_equal(_stored(_file(dicom, values, bits)), values)


def test_a_stream_whose_sign_its_file_denies_keeps_its_bits(dicom: MakeDicom) -> None:
    """The values equal those of GDCM, which earlier versions of medspark used."""
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64) * 16

    found = _stored(_file(dicom, values, 16, signed=False))

    assert np.array_equal(found.view(np.int16), values)


def test_pillow_decodes_what_it_keeps_every_bit_of_and_gdcm_nothing(dicom: MakeDicom) -> None:
    grey = (np.arange(4096, dtype=np.uint16) % 256).reshape(64, 64)
    colour = grey[..., None].repeat(3, 2)
    cases = {
        "pillow": [(grey, None), (grey.astype("i2"), None), (colour.astype("u1"), None)],
        "pylibjpeg": [(colour, None), (grey.astype("i2"), False)],
    }

    for decoder, files in cases.items():
        for values, signed in files:
            bits = 8 if values.dtype == np.uint8 else 12
            data = _file(dicom, values, bits, signed=signed)
            (frame,) = decode(data, rendering=Rendering(size=16))
            assert frame.attributes.decoder.startswith(decoder)
