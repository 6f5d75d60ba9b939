"""`python -m sanity.report`."""

import sys

from sanity.report import main

if __name__ == "__main__":
    sys.exit(main())
