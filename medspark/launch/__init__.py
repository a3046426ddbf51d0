"""Spark starts torch: the ranks of a training, which are watched over, and nothing else."""
