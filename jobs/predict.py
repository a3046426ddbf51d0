"""Apply a model to an archive of images without labels: a row for each file, in Parquet.

spark-submit jobs/predict.py --help
"""

import sys

from medspark.jobs.predict import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
