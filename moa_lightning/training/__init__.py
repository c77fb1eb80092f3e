"""What surrounds the training step: checks, checkpoints, resuming, strategies."""
