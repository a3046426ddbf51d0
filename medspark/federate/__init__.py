"""Federated learning without Spark: partition, adversaries, clients, aggregation, privacy."""
