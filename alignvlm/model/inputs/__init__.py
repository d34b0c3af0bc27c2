"""What the model is given: images as tiles, conversations as tokens, and the processor that joins them."""
