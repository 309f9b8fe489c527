"""Compares what a bundle computes with the PyTorch model that it was made from."""
