"""The decoding loops, and what they share: how tokens are chosen and judged, draft lengths, the running text."""
