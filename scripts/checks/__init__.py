"""Checks of what comes from others before anything in it runs, and of what goes to others."""
