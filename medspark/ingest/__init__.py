"""From an archive of files to training shards, on Spark: discover, label, decode, commit, split."""
