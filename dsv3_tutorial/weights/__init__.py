"""How a weight matrix lies in eight or four bits, and how it is multiplied as it lies there."""
