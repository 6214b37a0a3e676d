"""Pre-training codecs on updates recorded along training (TGAP)."""
