"""Training of a run: pipeline → stage → step. Everything that is not the step is a callback."""
