"""From samples to training shards."""
