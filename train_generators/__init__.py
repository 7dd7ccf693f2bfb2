"""Stage 2: fit generators on a zoo and compare initialisers (`python -m train_generators --help`)."""
