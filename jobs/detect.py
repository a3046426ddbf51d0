"""Fit detectors of attacked images, keep the best as the model's guard, and attack through it.

spark-submit jobs/detect.py --help
"""

import sys

from medspark.jobs.detect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
