"""`python -m mmattn`: the same as the `mmattn` command."""

import sys

from mmattn.cli.main import main

sys.exit(main())
