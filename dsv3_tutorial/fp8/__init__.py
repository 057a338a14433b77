"""Eight-bit floating point: how weights and activations are stored and multiplied in it."""
