"""Checks of files that came from others, before anything in them runs."""
