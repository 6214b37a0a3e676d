"""Federated fine-tuning of causal language models with very few bytes on the uplink."""

__version__ = "0.1.0"
