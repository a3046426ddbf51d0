"""Attack a trained model with everything there is, and say whether the figures can be trusted.

spark-submit jobs/evaluate.py --help
"""

import sys

from medspark.jobs.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
