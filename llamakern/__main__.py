"""`python -m llamakern`."""

import sys

from llamakern.cli import main

sys.exit(main())
