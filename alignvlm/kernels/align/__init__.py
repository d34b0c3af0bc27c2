"""The vocabulary softmax of ALIGN: a reference, blocks of the vocabulary, chunks of tokens."""
