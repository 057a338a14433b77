"""Serving a trained model: quantised weights, text, batches that requests join, speculation."""
