"""The training order as pure functions of numbers: shuffle, mixture, packing, plan."""
