"""From a checkpoint to a bundle. Needs the `export` extra: torch, onnx-ir, transformers, safetensors, gguf."""
