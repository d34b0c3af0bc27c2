"""`python -m alignvlm` is the `alignvlm` command."""

import sys

from alignvlm.cli import main

sys.exit(main())
