"""More processes than one: each module wraps a model that knows nothing of ranks."""
