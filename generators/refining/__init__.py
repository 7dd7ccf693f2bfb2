"""Refining initialisers: they take the weights that are there and improve them."""
