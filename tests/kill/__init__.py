"""Kills commands at random moments: a name never stands for half of something, and running again gives the same bytes.

Run from the repository with ``python -m tests.kill``.

====================  ======================================================================
:mod:`kill.commands`  the commands, small enough for hundreds of runs, and what each leaves
:mod:`kill.process`   runs one in a forked process, whole or until it is killed
:mod:`kill.check`     what must hold right after a kill, and after the command has run again
====================  ======================================================================
"""
