"""What one export is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import DType

DTYPES: dict[str, DType] = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """One export.

    Attributes:
        checkpoint: A folder of Hugging Face or Megatron, a GGUF file or a hub id.
        out: The bundle to write.
        exit_layers: Depths at which to cut, each the number of layers run before the exit; may be empty. Of a
            checkpoint that holds exits: which of them to take, all if empty.
        exits: A folder of trained exits, which bring their depths along and take the place of those that the
            checkpoint holds; None for those, or for exits without weights of their own.
        draft_vocab: Rows of every exit head that is the LM head, trimmed to the most frequent token ids; None keeps it
            whole. Trained exits with heads of their own, or trimmed when they were trained, stay as they are.
        draft_text: The text whose token frequencies choose the rows; None takes the one that ships with shortstack.
        dtype: Type of weights, activations and cache.
        keep_blocks: Store what a GGUF file holds in blocks of Q4_0 or Q8_0 in the same blocks, and its other quantized
            matrices, those that the adapter changes among them, in int8, as matrices of the exits' own; by default all
            become ``dtype``.
        max_length: Longest context in tokens; None takes the model's own.
        revision: Branch, tag or commit of a hub id.
        overwrite: Replace an existing bundle.
        adapter: A LoRA adapter to merge, as peft saves it.
    """

    checkpoint: str
    out: Path
    exit_layers: tuple[int, ...] = ()
    draft_vocab: int | None = None
    draft_text: Path | None = None
    dtype: DType = "float32"
    keep_blocks: bool = False
    max_length: int | None = None
    revision: str | None = None
    overwrite: bool = False
    adapter: Path | None = None
    exits: Path | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise RequestError("--max-length", found=self.max_length, expected="2 or more tokens")
