"""Start and supervise torch processes through Spark: ranks of a training, and work in pieces."""
