"""`python -m generators`: see `generators.cli`."""

import sys

from generators.cli import main
from generators.commandline import run

if __name__ == "__main__":
    sys.exit(run(main))
