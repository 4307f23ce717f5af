"""`python -m longspec_hf.cli`."""

import sys

from .main import main

sys.exit(main())
