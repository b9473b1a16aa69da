"""The command line as ``python -m fxlrd``."""

import sys

from fxlrd.cli import main

sys.exit(main())
