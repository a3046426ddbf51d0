"""Export a model for devices without torch, and report how robust the export is.

spark-submit jobs/export_edge.py --help
"""

import sys

from medspark.jobs.export_edge import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
