"""Spark support that every job shares: session, code shipping, storage, tasks and slots."""
