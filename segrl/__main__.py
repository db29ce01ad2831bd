"""`python -m segrl`."""

import sys

from segrl.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
