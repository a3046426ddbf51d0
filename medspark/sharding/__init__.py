"""Make training shards from samples, on Spark: split by patient, shuffle, write, commit."""
