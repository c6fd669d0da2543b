"""Checks before a run: keys, data, output folder, and a rehearsal of its first steps."""
