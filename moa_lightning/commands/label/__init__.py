"""The command ``moa label``."""
