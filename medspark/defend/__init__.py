"""Defences around a trained network, which is not trained again."""
