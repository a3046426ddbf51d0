"""Attacks: functions of (model, images, labels) that return images inside a threat model."""
