"""`python -m makd` is `makd`."""

import sys

from makd.cli import main

sys.exit(main())
