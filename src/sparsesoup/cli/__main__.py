"""`python -m sparsesoup.cli`: the command line."""

import sys

from sparsesoup.cli.main import main

sys.exit(main())
