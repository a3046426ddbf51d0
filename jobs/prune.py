"""Prune a trained model while it is fine-tuned on attacked images, so that it stays robust.

spark-submit jobs/prune.py --help
"""

import sys

from medspark.jobs.prune import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
