"""What every test shares: one thread a process, and laws that are tried without a stopwatch."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Two spinning thread pools on the same cores slow each other tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "medspark", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("medspark")
