"""Fine-tune a classifier against adversarial examples made on the fly, one process per device.

spark-submit jobs/train_at.py --help
"""

import sys

from medspark.jobs.train_at import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
