"""How much is measured, and on what: the full benchmark, and a quick one that only shows that everything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of the measurements. Lengths and counts of tokens.

    Attributes:
        prompt_lengths: Prompts of the comparison between engines.
        repeats: Generations per engine, the first of them a warm-up.
        chunks: Chunks per generation; the engines take turns after each.
        chunk_tokens: Tokens per chunk.
        rest_s: Seconds between turns, in which the threads of the engine before stop spinning.
        draft_prompts: Prompts on which strategies are compared.
        draft_prompt_tokens: Tokens decoded on each.
        draft_lengths: Fixed draft lengths to compare with plain decoding.
        draft_vocabs: Exit heads to compare: sizes of trimmed ones, None for the full one.
        verify_rows: The M of c(M).
        cost_repeats: Measurements of each cost.
        memory_prompt: Prompt of the memory measurement.
        memory_tokens: Tokens decoded in it.
        load_repeats: Processes that load a model, for each engine.
    """

    prompt_lengths: tuple[int, ...] = (64, 512)
    repeats: int = 5
    chunks: int = 4
    chunk_tokens: int = 32
    rest_s: float = 0.1
    draft_prompts: int = 8
    draft_prompt_tokens: int = 64
    draft_lengths: tuple[int, ...] = (1, 2, 3, 4)
    draft_vocabs: tuple[int | None, ...] = (None, 4096)
    verify_rows: tuple[int, ...] = tuple(range(1, 9))
    cost_repeats: int = 30
    memory_prompt: int = 64
    memory_tokens: int = 64
    load_repeats: int = 9


def cut(text: Sequence[int], length: int) -> list[int]:
    """Return a prompt: the first ``length`` ids of a text, repeated as often as it takes."""
    return [text[i % len(text)] for i in range(length)]


def head_name(vocab: int | None) -> str:
    """Return what the table calls an exit head."""
    return "full exit head" if vocab is None else f"exit head of {vocab}"


FULL = Settings()
QUICK = Settings(
    prompt_lengths=(64,),
    repeats=2,
    chunks=2,
    chunk_tokens=16,
    draft_prompts=2,
    draft_prompt_tokens=24,
    draft_lengths=(2,),
    draft_vocabs=(None, 4096),
    verify_rows=(1, 2, 4, 8),
    cost_repeats=5,
    load_repeats=2,
)
