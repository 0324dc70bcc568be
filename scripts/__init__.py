"""Commands beside those of the bundle, each run as ``python -m scripts.ROOM.NAME`` from the root of the repository."""
