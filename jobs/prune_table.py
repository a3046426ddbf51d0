"""Prune models by several methods to several sparsities, attack them, and make one table.

spark-submit jobs/prune_table.py --help
"""

import sys

from medspark.jobs.prune_table import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
