"""Text in and out: the tokenizer, text from a growing list of tokens, stop strings. Knows nothing about models."""
