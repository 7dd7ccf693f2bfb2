"""`python -m collect`."""

import sys

from collect.cli import main
from generators.commandline import run

if __name__ == "__main__":  # worker processes import this module again and must not start the program
    sys.exit(run(main))
