"""Reasons why a file cannot become a sample: the reason codes of the quarantine table."""

from __future__ import annotations

from enum import StrEnum

from medspark.errors import MedsparkError


class Reason(StrEnum):
    """A quarantine reason code; ``meaning`` explains it in one line."""

    meaning: str

    def __new__(cls, code: str, meaning: str) -> Reason:
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    EMPTY_FILE = "empty_file", "the file has no bytes"
    UNREADABLE_FILE = "unreadable_file", "the file could not be opened or read from storage"
    LINK_OUTSIDE = (
        "link_outside",
        "a link that leads out of the source; --limits.follow_links follows it",
    )
    NOT_AN_IMAGE = "not_an_image", "the content is neither DICOM nor PNG, JPEG, TIFF or BMP"
    TRUNCATED = "truncated", "the file ends before its pixels do"
    NO_FILE_META = (
        "no_file_meta",
        "a bare DICOM data set: without file meta information its transfer syntax is unknown",
    )
    NO_PIXEL_DATA = (
        "no_pixel_data",
        "a DICOM object without pixels (report, plan, DICOMDIR)",
    )
    UNSUPPORTED_TRANSFER_SYNTAX = (
        "unsupported_transfer_syntax",
        "no permissively licensed decoder reads this transfer syntax",
    )
    GPL_DECODER_ONLY = (
        "gpl_decoder_only",
        "only a GPL decoder, which medspark does not include, reads this JPEG process",
    )
    UNSUPPORTED_PHOTOMETRIC = (
        "unsupported_photometric",
        "the photometric interpretation or sample format cannot be shown as grey or RGB",
    )
    TOO_LARGE = "too_large", "file, frame or number of frames is beyond the configured limits"
    DECOMPRESSION_BOMB = (
        "decompression_bomb",
        "the content expands far more than image data does",
    )
    INCONSISTENT_HEADER = (
        "inconsistent_header",
        "the header contradicts itself, or the pixel stream it describes",
    )
    DECODE_FAILED = "decode_failed", "the pixels are damaged: the decoder refused them"
    DECODE_TIMEOUT = "decode_timeout", "decoding took longer than the configured time"
    DECODER_CRASHED = (
        "decoder_crashed",
        "the decoder process crashed or exceeded its memory limit",
    )
    BURNED_IN_ANNOTATION = (
        "burned_in_annotation",
        "the pixels may show text that identifies the patient",
    )
    NO_LABEL = "no_label", "the image is fine, but no label is known for it"
    CONFLICTING_LABEL = "conflicting_label", "the same file or the same pixels carry two labels"


class Unreadable(MedsparkError):  # noqa: N818 - the sentence reads "raise Unreadable"
    """A file that cannot become a sample.

    ``message`` explains the reason without quoting the file's content, so that it can be stored
    and logged.
    """

    def __init__(self, reason: Reason, message: str = "") -> None:
        self.reason = reason
        self.message = message or reason.meaning
        super().__init__(f"{reason.value}: {self.message}")

    def __reduce__(self) -> tuple[type[Unreadable], tuple[Reason, str]]:
        return type(self), (self.reason, self.message)
