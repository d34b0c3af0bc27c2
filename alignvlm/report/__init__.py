"""The HTML report of a run, with its charts and overlays, and the goodput: where the wall clock of the run went."""
