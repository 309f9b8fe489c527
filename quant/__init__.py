"""From a bundle to a smaller bundle.

Nothing lives here yet: the quantization passes will rewrite bundles that ``export`` made.
"""
