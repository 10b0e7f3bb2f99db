"""Records become tables, and are compared."""
