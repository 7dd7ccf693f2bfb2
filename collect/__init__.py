"""Stage 1: train many networks and keep their weights and curves in a folder of HDF5 files, a zoo.

`collect.plan` says what to train, `collect.runner` trains it, `collect.zoo` reads what came out;
`python -m collect --help` does all three from a shell.
"""
