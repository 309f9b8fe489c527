"""How far apart two computations of one model may be, each number with its reason.

"Measured" means: on a two-core x86 virtual machine, onnxruntime 1.32.0 against PyTorch 2.13.0, both in float32 unless
noted. A tolerance is a few times the measured value, so that another CPU passes and a wrong tensor does not.
"""

from __future__ import annotations

from shortstack.export.parity.compare import Tolerance

SMOLLM2 = Tolerance(max_abs=1e-3, mean_abs=5e-5, tie=1e-4, relative=2e-5)
"""SmolLM2-135M-Instruct; max and mean are what the first bundle had to meet.

Measured on five prompts: at most 1.2e-4 and 1.4e-5 over all heads, relative 4.2e-6, no fork."""

TINY = Tolerance(max_abs=2e-4, mean_abs=1e-5, tie=1e-4, relative=2e-5)
"""Random tiny models, whose logits have a standard deviation of 2 to 3.

Measured over all config options: at most 4.5e-5 and 2.5e-6, relative 4e-6, no fork."""

TINY_FP16 = Tolerance(max_abs=0.4, mean_abs=0.02, tie=0.1, relative=4e-2)
"""The same models with float16 weights, activations and cache: 11 bits of mantissa in every layer.

Measured: at most 0.17 and 0.0084, relative 1.2e-2; greedy forks at leads of at most 0.017."""

HEAD_OUTPUTS_FP32 = 1e-5
"""A token's probability, margin and entropy against numpy in float64 from the same logits: a few ulps of a softmax over
300 columns. Entropy is the difference of two numbers of the size of a logit, so the tolerance is not smaller."""

QUANTIZED_SAME_WEIGHTS = 0.12
"""A bundle in blocks against the float bundle of the weights that its blocks stand for: root mean square of the logits'
difference, divided by their standard deviation. The products round their inputs to 8 bits, and an int8 cache rounds
keys and values; nothing else differs.

Measured on eight tiny models, on text of the kind that the cache was calibrated on: at most 0.046, with an int8 cache
0.060. (Random token ids reach codes beyond what calibration saw: 0.27.)"""

QUANTIZED_INT8 = 0.15
"""The same figure for weights in int8 against the bundle that they were rounded from. Measured: at most 0.074."""

FLUSHED_KV = 1e-5
"""Keys and values after early exit against one full-depth run over the same text, in float32: largest difference,
divided by the largest value of the layer. The products are the same, in runs with other numbers of rows. Early exit
must meet this.

Measured on a random six-layer model: at most 2.1e-6."""

INT8_CACHE = 0.08
"""Logits with an int8 cache against the bundle of the same weights with a float cache: root mean square of the
difference, divided by their standard deviation, on text of the kind that the cache was calibrated on.

Measured on six-layer models that share keys and values, with layers that look up and with masked diagonals: at most
0.029. (Random token ids: 0.051.)"""
