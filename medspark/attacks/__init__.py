"""Attacks: functions of (model, images, labels) that stay inside a threat model."""
