"""Every family of docs/families.md, checked; ``python -m tests.families`` writes its table."""
