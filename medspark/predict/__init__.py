"""Archive to answers: list, decode, ask a model, quarantine, commit. No torch."""
