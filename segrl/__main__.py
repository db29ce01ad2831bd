"""`python -m segrl`."""

import sys

from segrl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
