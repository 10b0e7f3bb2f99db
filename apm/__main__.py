"""`python -m apm` is the `apm` command."""

from apm.cli.main import main

if __name__ == "__main__":
    main()
