"""What each job does, from its configuration to its result."""
