"""Models for devices without torch: export, quantise, judge what arrives there, and predict."""
