"""Turn an archive of medical images into a dataset of de-identified samples for training.

spark-submit jobs/ingest.py --help
"""

import sys

from medspark.jobs.ingest import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
