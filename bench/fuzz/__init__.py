"""Wrong and right input of every kind, and what becomes of it."""
