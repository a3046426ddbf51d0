"""Archives and the ingests of them, as fixtures."""

from archive_runs import ingested, key_file, phantom, run
from private_archive import runs

__all__ = ["ingested", "key_file", "phantom", "run", "runs"]
