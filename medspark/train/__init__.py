"""The training engine: adversarial steps, schedules, checkpoints and the loop over epochs."""
