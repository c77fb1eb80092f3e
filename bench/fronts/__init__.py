"""Where each combiner ends on toy problems with known fronts."""
