"""One question, one file: `python -m apm.benchmarks.studies.NAME`."""
