"""Train a student from a trained teacher, to compress the teacher or to transfer its robustness.

spark-submit jobs/distill.py --help
"""

import sys

from medspark.jobs.distill import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
