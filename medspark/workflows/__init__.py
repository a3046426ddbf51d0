"""The work of each job, from its configuration to its result."""
