"""Attack a trained model, report its robustness, and flag results you should not trust.

spark-submit jobs/evaluate.py --help
"""

import sys

from medspark.jobs.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
