"""Compare recipes of training at equal time, choose one on validation images, and test it once.

spark-submit jobs/recipe_table.py --help
"""

import sys

from medspark.jobs.recipe_table import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
