"""What several combiners share."""
