"""Measures of a trained adapter."""
