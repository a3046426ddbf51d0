"""Turn an archive of files into a sample dataset, on Spark: discover, label, decode, commit."""
