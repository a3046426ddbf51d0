"""Evaluation of classifiers, clean and under attack, with sanity checks on the results."""
