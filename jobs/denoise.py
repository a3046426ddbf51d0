"""Train a denoiser and a detector of attacked images for a trained model, and keep them with it.

spark-submit jobs/denoise.py --help
"""

import sys

from medspark.jobs.denoise import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
