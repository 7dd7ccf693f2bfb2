"""Local generators: one small model per weight group draws kernels, whatever model they are for."""
