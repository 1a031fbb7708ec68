"""`python -m makd` is `makd`."""

import sys

from makd.cli.main import main

sys.exit(main())
