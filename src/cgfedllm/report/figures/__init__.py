"""Figures, drawn without a display; each goes to a PNG and an SVG of the same content."""
