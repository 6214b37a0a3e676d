"""Handwritten digits, learned by clients that keep their own."""
