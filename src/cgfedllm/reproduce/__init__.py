"""The paper's comparison, from nothing to its table, by one command."""
