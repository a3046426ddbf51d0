"""Remove patients from samples, and name the shards and models that learnt from their images.

spark-submit jobs/forget.py --help
"""

import sys

from medspark.jobs.forget import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
