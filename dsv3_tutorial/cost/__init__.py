"""What a model should cost, on paper: counted from its config alone, before anything is built."""
