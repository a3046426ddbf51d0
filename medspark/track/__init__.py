"""What a run reports: the journal of its metrics, its MLflow run, and scaling arithmetic."""
