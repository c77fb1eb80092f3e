"""The command ``moa combiners``."""
