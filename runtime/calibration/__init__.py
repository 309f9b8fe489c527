"""Thresholds for early exit with a guarantee: Learn-then-Test finds them on a user's prompts; a profile keeps them."""
