"""One module per concept, each declaring its exercises in a list EXERCISES."""
