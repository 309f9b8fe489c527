"""Builders of segment graphs on onnx-ir. Closed to runtime, which reads contracts only."""
