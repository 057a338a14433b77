"""How a token reads the ones before it, and what has to be kept in memory for that."""
