"""Models for devices without torch: export, quantise, attack the exported graph, predict."""
