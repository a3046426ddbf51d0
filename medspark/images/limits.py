"""Limits of one file: bytes, pixels, expansion, seconds and memory."""

from __future__ import annotations

from pydantic import Field

from medspark.config import Config
from medspark.images.reasons import Reason, Unreadable

# Below this decoded size every ratio is accepted: a blank page compresses a thousandfold. Larger
# medical images compress less than a hundredfold; deflate can reach 1,032.
_HARMLESS_BYTES = 1 << 26


class Limits(Config):
    """Limits that are checked on headers, before anything is decoded."""

    file_bytes: int = Field(1 << 30, ge=1, description="largest file, in bytes")
    frame_pixels: int = Field(1 << 26, ge=1, description="largest frame, in pixels")
    frames: int = Field(1 << 14, ge=1, description="most frames in one file")
    output_bytes: int = Field(1 << 30, ge=1, description="most bytes of rendered pixels per file")
    expansion: float = Field(
        200.0, ge=1, description="most decoded bytes per compressed byte, beyond 64 MiB decoded"
    )
    frame_seconds: float = Field(
        30.0, gt=0, description="longest wait for one frame, in seconds (guarded decoding)"
    )
    file_seconds: float = Field(
        600.0, gt=0, description="longest time for one file, in seconds (guarded decoding)"
    )
    memory_bytes: int = Field(
        2 << 30, ge=1 << 28, description="address space of the decoder process, in bytes"
    )

    def check_file(self, size: int) -> None:
        """Raise Unreadable for a file of ``size`` bytes that is empty or too large."""
        if size == 0:
            raise Unreadable(Reason.EMPTY_FILE)
        if size > self.file_bytes:
            raise Unreadable(Reason.TOO_LARGE, f"{size} bytes, limit {self.file_bytes}")

    def check_frame(self, rows: int, columns: int, frames: int = 1) -> None:
        """Raise Unreadable for dimensions that are impossible or too large."""
        if rows < 1 or columns < 1 or frames < 1:
            raise Unreadable(Reason.INCONSISTENT_HEADER, "rows, columns or frames are zero")
        if rows * columns > self.frame_pixels:
            raise Unreadable(
                Reason.TOO_LARGE, f"{rows} x {columns} pixels, limit {self.frame_pixels}"
            )
        if frames > self.frames:
            raise Unreadable(Reason.TOO_LARGE, f"{frames} frames, limit {self.frames}")

    def check_output(self, size: int) -> None:
        """Raise Unreadable if ``size``, the rendered bytes of one file, is too large."""
        if size > self.output_bytes:
            raise Unreadable(
                Reason.TOO_LARGE,
                f"{size} bytes of rendered pixels, limit {self.output_bytes}",
            )

    def check_expansion(self, compressed: int, decoded: int) -> None:
        """Raise Unreadable if ``compressed`` bytes claim to hold too many ``decoded`` bytes."""
        if decoded > _HARMLESS_BYTES and decoded > compressed * self.expansion:
            raise Unreadable(
                Reason.DECOMPRESSION_BOMB, f"{compressed} bytes claim to hold {decoded}"
            )
