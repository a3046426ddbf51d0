"""Fit a model's temperature and threshold to a few labelled images of the place that will use it.

spark-submit jobs/recalibrate.py --help
"""

import sys

from medspark.jobs.recalibrate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
