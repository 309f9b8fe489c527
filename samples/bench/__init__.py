"""The benchmark: ``python -m shortstack.samples.bench``, or ``make bench``.

Times mean little on a shared machine, so every comparison is a ratio of runs that took turns, given as the median with
the quartiles around it.
"""
