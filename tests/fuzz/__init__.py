"""Damaged and hostile inputs, drawn from a seed: every one must be refused in one line, or be right.

Run from the repository with ``python -m tests.fuzz``. ``--only TARGET:NUMBER --keep FOLDER`` runs one input again.

====================  ======================================================================
:mod:`fuzz.damage`    what is done to bytes, JSON values and files; knows nothing of models
:mod:`fuzz.templates` chat templates out of sound and hostile pieces
:mod:`fuzz.targets`   what is damaged, and the command that then runs on it
:mod:`fuzz.child`     runs something in a forked process with limits on memory and time
:mod:`fuzz.oracle`    what is right: plain decoding, and transformers on the same folder
:mod:`fuzz.verdict`   judges an outcome
====================  ======================================================================
"""
