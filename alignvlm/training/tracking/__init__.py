"""MLflow as a mirror of the run folder."""
