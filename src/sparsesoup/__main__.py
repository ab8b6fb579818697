"""`python -m sparsesoup`: the command line."""

import sys

from sparsesoup.cli import main

sys.exit(main())
