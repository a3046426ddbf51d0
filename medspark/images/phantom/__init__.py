"""Generate a synthetic archive of chest radiographs: many syntaxes, planted names, damaged files.

    python -m medspark.images.phantom FOLDER --count 2000 --size 96 --seed 0

The seed and the image's number determine each image, so any machine can generate any part of the
archive. The two classes differ by a faint opacity in one lung. Anatomy, texture and noise vary more
than the opacity does: a small network reaches a test AUROC of about .95, never 1.
"""

from __future__ import annotations

from medspark.images.phantom.archive import ArchiveSummary, write_archive
from medspark.images.phantom.files import encode, header, stored_values, to_bytes
from medspark.images.phantom.plan import CANARY, CLASSES, SYNTAXES, PhantomConfig, Study, plan
from medspark.images.phantom.radiograph import radiograph

__all__ = [
    "CANARY", "CLASSES", "SYNTAXES", "ArchiveSummary", "PhantomConfig", "Study", "encode", "header",
    "plan", "radiograph", "stored_values", "to_bytes", "write_archive",
]  # fmt: skip
