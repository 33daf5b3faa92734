"""`python -m dsv3_compile` is `dsv3c`."""

import sys

from dsv3_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
