"""The texts that ship with shortstack: what to calibrate on, what to judge by, prompts. Every room may read them."""
