"""Train the same thing at many scales: processes, shares of the data, networks, ways to train.

spark-submit jobs/scale_at.py --help
"""

import sys

from medspark.jobs.scale_at import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
