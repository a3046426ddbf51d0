"""What an archive may cost, and how far it reaches."""

from __future__ import annotations

from pydantic import Field

from medspark.images.limits import Limits


class ArchiveLimits(Limits):
    """Bounds of each file, and of what an archive may hold or lead to."""

    follow_links: bool = Field(
        False, description="take files outside the source that symbolic links in it lead to"
    )
    npz_arrays: int = Field(64, ge=1, description="most arrays in an .npz archive")
    npz_images: int = Field(1 << 20, ge=1, description="most images in an .npz archive")
    npz_bytes: int = Field(
        64 << 30, ge=1, description="most bytes that the arrays of an .npz archive unpack to"
    )
