"""Programs that wrote the texts in ``graphs/texts``: questions that a model asks itself, and its answers."""
