"""`python -m grafos._cli`: the command `grafos` where it is not on the path."""

import sys

from grafos._cli import main

sys.exit(main())
