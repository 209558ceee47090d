"""`python -m bigload`."""

import sys

from .cli import main

sys.exit(main())
