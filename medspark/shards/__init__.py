"""The contract between Spark and torch: Parquet shards, their manifest, and the reading plan."""
