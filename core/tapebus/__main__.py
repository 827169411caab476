"""``python -m tapebus``: the same as the ``tapebus`` command."""

import sys

from tapebus.cli import main

sys.exit(main())
