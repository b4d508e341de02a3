"""Output of a run: progress, row counts, tables."""
