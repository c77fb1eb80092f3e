"""MOPO against exact solutions, noisy and missing labels, and its cost."""
