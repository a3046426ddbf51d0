"""What every Spark job needs: session, code, storage, lock, tasks, slots."""
