"""The options of one export, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import DType

DTYPES: dict[str, DType] = {"fp32": "float32", "fp16": "float16"}


OWN_DRAFTER = "mtp"
"""In place of a drafter's folder: the layers for multi-token prediction that the checkpoint itself has."""

DEFAULT_LONGEST = 131_072
"""The longest context of a bundle unless ``max_length`` asks for more: its rotary tables take memory and disk."""

LONGEST = 1 << 24
"""The longest context of any bundle: with it the rotary tables take 16 GB."""


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """The options of one export.

    Attributes:
        checkpoint: A Hugging Face or Megatron folder, a GGUF file or a hub id.
        out: The bundle to write.
        exit_layers: Depths at which to cut, each the number of layers run before the exit. May be empty. If the
            checkpoint holds exits, this chooses among them; empty takes all of them.
        exits: A folder of trained exits. They bring their own depths and replace the exits that the checkpoint holds.
            None uses those of the checkpoint, or exits without weights of their own.
        draft_vocab: Number of rows, those of the most frequent token ids, that stay in each exit head that is the LM
            head. None keeps it whole. Trained exits that have their own heads, or that were trimmed when they were
            trained, stay as they are.
        draft_text: The text whose token frequencies choose the rows; None takes the one that ships with shortstack.
        dtype: Type of weights, activations and cache.
        keep_blocks: Keep the blocks of a quantized checkpoint: those of a GGUF file and the integers of GPTQ, AWQ and
            compressed-tensors. Its other quantized matrices, including those that the adapter changes, are stored in
            int8, and so are the exits' own matrices. By default all matrices become ``dtype``. Where the export is
            quantized too, what is not kept is rounded as that says.
        max_length: Longest context in tokens; None takes the model's limit, or :data:`DEFAULT_LONGEST` if that is less.
        revision: Branch, tag or commit of a hub id.
        overwrite: Replace an existing bundle.
        adapter: The folder of a LoRA adapter to merge, as peft saves it.
        drafter: A trained drafter to write beside the model: its folder, GGUF file or hub id, or :data:`OWN_DRAFTER`.
        genai: Also write what onnxruntime-genai needs to run the uncut model from the same weights.
        follow_links: Follow links that lead out of the checkpoint's folder. Those of the hub's cache always are.
        allow_pickle: Read tensors from pickles, where there are no safetensors. Code in them is never run.
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
    drafter: str | None = None
    follow_links: bool = False
    genai: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise RequestError("--max-length", found=self.max_length, expected="2 or more tokens")
        if self.max_length is not None and self.max_length > LONGEST:
            raise RequestError("--max-length", found=self.max_length, expected=f"at most {LONGEST} tokens")
