"""Writes heldout.jsonl: questions that the default model asks itself, and answers that it samples; about 12k tokens.

    python -m shortstack.samples.texts.make_heldout_text BUNDLE [TOKENS]

Quantized bundles are judged on it. Sampled at temperature 1 from the whole distribution, so that on this text the mean
of log p(token) - log q(token) estimates the divergence of another model q from the one that wrote it. No line of
``draft_vocab.txt``, which calibration reads, is in it: seeds differ. The output of an Apache-2.0 model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shortstack.graphs.texts import HELDOUT_TEXT
from shortstack.runtime import Model, SamplingParams, load

_TURN_END = "<|im_end|>"
_FIRST_SEED = 100_000


def ask_and_answer(model: Model, seed: int) -> tuple[list[dict[str, str]], int]:
    """Return one conversation, and how many tokens it took to make."""
    sampling = SamplingParams(temperature=1.0, seed=seed)
    question = model.generate(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n",
        max_new_tokens=80,
        sampling=sampling,
        stop=[_TURN_END],
    )
    turn = {"role": "user", "content": question.text.strip() or "Hello!"}
    answer = model.generate([turn], max_new_tokens=200, sampling=sampling)
    messages = [turn, {"role": "assistant", "content": answer.text.strip()}]
    return messages, len(question.tokens) + len(answer.tokens)


def main(bundle: str, tokens: int = 12_000, out: Path = HELDOUT_TEXT) -> None:
    """Write conversations until ``tokens`` tokens were made."""
    model = load(bundle)
    made = 0
    lines: list[str] = []
    while made < tokens:
        messages, count = ask_and_answer(model, _FIRST_SEED + len(lines))
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
        made += count
        print(f"\r{made} of {tokens} tokens", end="", file=sys.stderr, flush=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 12_000)
