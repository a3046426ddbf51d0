"""Tracking: the journal of a run's metrics, its spool, and its MLflow run."""
