"""One question per file: `python -m apm.benchmarks.studies.NAME`."""
