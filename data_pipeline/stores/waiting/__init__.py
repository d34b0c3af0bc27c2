"""How long a store that does not answer is waited for, and what the processes of a node tell each other of it."""
