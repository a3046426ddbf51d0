"""Shards to batches: two readers behind one interface, augmentation, prefetching."""
