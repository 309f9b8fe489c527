"""Print an answer as it is made, what was drafted in green: ``python samples/examples/stream.py BUNDLE``."""

import sys

from shortstack import load

GREEN, PLAIN = "\033[32m", "\033[0m"

with load(sys.argv[1]) as model:
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    stream = model.stream(question, max_new_tokens=48, strategy="self-speculative", stop=["\n\n"])
    for token in stream:  # token.text is empty while a character, or a possible stop string, is incomplete
        print(f"{GREEN}{token.text}{PLAIN}" if token.from_draft else token.text, end="", flush=True)
    print(f"\nended by {stream.finish_reason} after {stream.stats.emitted} tokens")
    # stream.cancel() ends it from another thread; leaving the loop early keeps the model usable.
