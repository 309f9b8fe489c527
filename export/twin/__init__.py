"""The PyTorch twin of the graphs: the same model, which can be trained and is the reference for its exits."""
