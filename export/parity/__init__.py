"""A bundle's answers compared with those of the PyTorch model that it was made from."""
