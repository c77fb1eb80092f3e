"""The command ``moa compare``."""
