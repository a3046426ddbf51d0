"""One launch of the ranks: start, rendezvous, work, supervision and reports."""
