"""Accuracy, speed and memory, against other methods."""
