"""How fast the student is, against the floor that the machine's own rates set: ``python -m apm.benchmarks.speed``."""
