"""Turn samples into training shards of decoded pixels, split by patient, shuffled, of equal size.

spark-submit jobs/shard.py --help
"""

import sys

from medspark.jobs.shard import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
