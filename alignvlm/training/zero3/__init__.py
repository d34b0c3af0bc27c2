"""What ZeRO-3 does for every layer and parameter in a micro-batch, and how it takes the host less time."""
