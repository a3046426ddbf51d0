"""Attack a federation with backdoors: adversaries x aggregation rules, make one table.

spark-submit jobs/backdoor_table.py --help
"""

import sys

from medspark.jobs.backdoor_table import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
