"""What a free reply chose: a letter of several options, or yes or no."""
