"""Differential privacy of a client's part in a run: budgets, noise, and what was released."""
