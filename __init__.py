"""shortstack: cut a trained causal language model at its exits into ONNX graphs, shrink them, decode with them."""

__version__ = "0.1.0"
