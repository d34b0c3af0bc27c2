"""The cells of a study: their recipes, their batches, what they will take, and training them."""
