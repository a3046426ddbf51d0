"""Ways to combine the gradients of all ranks: DDP, memory of one host, or an exact sum."""
