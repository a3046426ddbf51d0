"""Studies: grids of resumable cells, and the reports on them."""
