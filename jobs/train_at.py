"""Fine-tune a classifier on adversarial examples made during training, one process per device.

spark-submit jobs/train_at.py --help
"""

import sys

from medspark.jobs.train_at import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
