"""What the combiners cost, one by one and in a whole step."""
