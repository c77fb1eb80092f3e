"""Helpers that know nothing of alignment."""
