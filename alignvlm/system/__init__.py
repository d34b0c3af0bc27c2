"""What a job needs of the machine it runs on: a home, one job per run folder, signals, monitors, ranks that wait."""
