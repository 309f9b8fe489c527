"""The decoding loops and what they share: choosing and judging tokens, drafters, draft lengths, the running text."""
