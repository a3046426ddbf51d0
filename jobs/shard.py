"""Turn samples into training shards: split by patient, shuffled, equal files, decoded pixels.

spark-submit jobs/shard.py --help
"""

import sys

from medspark.jobs.shard import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
