"""Turn shards into batches: two readers with one interface, augmentation and prefetching."""
