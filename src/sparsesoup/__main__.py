"""`python -m sparsesoup`: the command line."""

import sys

from sparsesoup.cli.main import main

sys.exit(main())
