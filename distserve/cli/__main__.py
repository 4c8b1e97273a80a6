"""``python -m distserve.cli``: the same as ``distserve``, for where scripts are not on the path."""

import sys

from distserve.cli.main import main

sys.exit(main())
