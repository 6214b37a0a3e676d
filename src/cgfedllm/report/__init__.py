"""Watching a run and telling what came out: console, trackers, tables, inspection."""
