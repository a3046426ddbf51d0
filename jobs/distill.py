"""Train a student from a trained teacher: to compress it, or to carry its robustness over.

spark-submit jobs/distill.py --help
"""

import sys

from medspark.jobs.distill import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
