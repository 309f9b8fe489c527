"""What runs out of the box: the default model, the demo, benchmarks, and the text that trims draft heads."""
