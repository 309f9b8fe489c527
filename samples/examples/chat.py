"""A conversation that keeps its cache between turns: ``python samples/examples/chat.py BUNDLE``."""

import sys

from shortstack import load

QUESTIONS = ("What is the capital of France?", "And of Italy?", "Which of the two is larger?")

with load(sys.argv[1]) as model:
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        # Only what the cache does not hold yet runs through the model: the new question, not the whole conversation.
        answer = model.generate(messages, max_new_tokens=32, reuse_cache=True)
        messages.append({"role": "assistant", "content": answer.text})
        print(f"> {question}\n{answer.text}")
        print(f"({answer.stats.reused} of {answer.stats.prompt} prompt tokens were in the cache)\n")
