"""`python -m partialfc`, which torchrun starts with `-m partialfc`."""

import sys

from partialfc.cli import main

if __name__ == "__main__":
    sys.exit(main())
