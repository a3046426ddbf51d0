"""One launch of the ranks: how they start, work, are watched, and say what became of them."""
