"""The files of a checkpoint: written and read with checksums, and listed in its manifest."""
