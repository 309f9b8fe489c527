"""Text on its way in and out: the tokenizer, text from a growing list of tokens, stop strings. Knows no model."""
