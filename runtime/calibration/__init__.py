"""Thresholds for early exit with a guarantee: found by Learn-then-Test on a user's prompts, kept in a profile."""
