"""Measured runs: what this machine really does, written down as receipts."""
