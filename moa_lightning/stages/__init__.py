"""What comes before alignment: a policy taught on text, a reward model trained on preferences."""
