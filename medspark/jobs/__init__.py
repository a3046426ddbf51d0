"""The command of each job: its configuration, the call, and what is printed."""
