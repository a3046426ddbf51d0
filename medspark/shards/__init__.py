"""The contract between Spark and torch: Parquet shards, their manifest, and who reads what."""
