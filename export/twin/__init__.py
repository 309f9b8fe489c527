"""The PyTorch twin of what the graphs compute: the same model, trainable, and the reference for its exits."""
