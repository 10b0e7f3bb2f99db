"""`python -m apm` and the `apm` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; never returns. Imports it here, so that Ctrl-C is quiet from the first moment on."""
    try:
        from apm.cli.main import main as command

        command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
