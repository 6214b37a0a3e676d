"""The single-file HTML report: one of a run, one that compares several."""
