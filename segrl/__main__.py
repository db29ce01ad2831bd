"""`python -m segrl`."""

import sys

from segrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
