"""Inherited initialisers: a model starts from the weights of a trained relative."""
