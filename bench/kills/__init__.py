"""Runs that are killed and resumed, beside ones that were not."""
