"""How good a classifier is, clean and under attack, and whether the figures can be trusted."""
