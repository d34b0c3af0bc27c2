"""What a job needs of the machine that it runs on: a home for libraries, and a run folder of its own."""
