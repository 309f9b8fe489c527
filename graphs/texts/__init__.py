"""The texts that ship with shortstack, by what they are for. On the ground floor, because several rooms read them.

All were written for shortstack or sampled from its default model by ``samples/texts``.

Attributes:
    DRAFT_VOCAB_TEXT: Plain text whose token frequencies choose the rows of a trimmed draft head.
    CALIBRATION_TEXT: What calibrated quantization methods look at; the same text.
    HELDOUT_TEXT: JSON lines of conversations that a quantized bundle is judged on; nothing is calibrated on them.
    PROMPTS_FILE: JSON lines of short prompts of several kinds, for parity checks and benchmarks.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent

DRAFT_VOCAB_TEXT = _FOLDER / "draft_vocab.txt"
CALIBRATION_TEXT = DRAFT_VOCAB_TEXT
HELDOUT_TEXT = _FOLDER / "heldout.jsonl"
PROMPTS_FILE = _FOLDER / "prompts.jsonl"
