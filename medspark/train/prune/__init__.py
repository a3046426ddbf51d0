"""Pruning during a training: penalties, scores, masks, and the removal of channels."""
