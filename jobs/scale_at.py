"""Train at many scales (processes, data shares, networks, training modes) and compare.

spark-submit jobs/scale_at.py --help
"""

import sys

from medspark.jobs.scale_at import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
