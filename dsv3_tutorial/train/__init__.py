"""Training: real text as bytes, and the loop that learns it."""
