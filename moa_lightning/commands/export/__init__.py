"""The command ``moa export``."""
