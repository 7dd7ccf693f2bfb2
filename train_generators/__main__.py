"""`python -m train_generators`: see `train_generators.cli`."""

import sys

from generators.commandline import run
from train_generators.cli import main

if __name__ == "__main__":
    sys.exit(run(main))
