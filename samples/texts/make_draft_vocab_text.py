"""Writes draft_vocab.txt: questions that the default model asks itself, and its answers; about 150 kB.

    python -m shortstack.samples.texts.make_draft_vocab_text BUNDLE [TOKENS]

A trimmed draft head keeps the ids that are frequent in the text its model writes, so the model writes the text: a
user turn sampled from nothing, then the assistant's greedy answer. Resumable; the output of an Apache-2.0 model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from shortstack.graphs.texts import DRAFT_VOCAB_TEXT
from shortstack.runtime import Model, SamplingParams, load

_TURN_END = "<|im_end|>"


def ask_and_answer(model: Model, seed: int) -> tuple[str, int]:
    """Return one question with its answer, and how many tokens they took to make."""
    question = model.generate(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n",
        max_new_tokens=80,
        sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=seed),
        stop=[_TURN_END],
    )
    answer = model.generate([{"role": "user", "content": question.text or "Hello!"}], max_new_tokens=160)
    return f"{question.text.strip()}\n{answer.text.strip()}\n\n", len(question.tokens) + len(answer.tokens)


def main(bundle: str, tokens: int = 32_000, out: Path = DRAFT_VOCAB_TEXT) -> None:
    """Append to the text until ``tokens`` tokens were made."""
    model = load(bundle)
    text = out.read_text(encoding="utf-8") if out.exists() else ""
    made = len(model.tokenizer.encode(text))
    seed = text.count("\n\n")
    while made < tokens:
        pair, count = ask_and_answer(model, seed)
        with out.open("a", encoding="utf-8") as file:
            file.write(pair)
        made, seed = made + count, seed + 1
        print(f"\r{made} of {tokens} tokens", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 32_000)
