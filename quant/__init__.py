"""From a bundle to a smaller bundle: weights in blocks of small integers, float16, an int8 cache.

A *format* says how a matrix is stored, a *preset* which matrix gets which format, a *method* how weights are rounded::

    options (cli.py, options.py) ── preset ── assign: a format for each matrix (preset.py), or search.py for --max-kl
    source bundle (source.py) ───── layer by layer (rounding.py, layers.py), by a method (method.py, methods/)
    finished bundle (assemble.py) ─ compared with its source (quality_report.py, quality*.py)
"""
