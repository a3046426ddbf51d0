"""Train one network with many clients that share no image, and aggregate their updates.

spark-submit jobs/federate.py --help
"""

import sys

from medspark.jobs.federate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
