"""Grids of resumable cells, and the reports that are made of them."""
