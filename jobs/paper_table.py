"""Run the paper's experiment: train and attack networks x datasets x trainings, make one table.

spark-submit jobs/paper_table.py --help
"""

import sys

from medspark.jobs.paper_table import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
