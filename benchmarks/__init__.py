"""Data sets, corruptions, methods, runs, records and tables."""
