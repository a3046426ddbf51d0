"""The command of each job: its configuration, its entry point and the summary it prints."""
