"""Which tokens end a generation in a GGUF file: those that llama.cpp takes for one (``special_eog_ids``).

A file names one end of sequence, and perhaps an end of turn and an end of message. But the chat turns of many files end
in a token that no field names. So llama.cpp also knows such tokens by their text (src/llama-vocab.cpp, as of
November 2026), and the same tables are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from shortstack.export.checkpoint.config import Config

_BY_FIELD = ("eos", "eot", "eom")
_BY_TEXT = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
)
# Marks of infilling. The text counts only where no field names the token.
_OF_INFILLING: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        "fim_sep": ("<|file_sep|>",),
    }
)
# If all of the first are among the ends, the second is a mark inside an answer and no end.
_NO_ENDS = (
    (("<|return|>", "<|call|>"), "<|end|>"),
    (("<|call|>", "<|flush|>"), "<|end|>"),
    (("<|calls|>", "<|flush|>"), "<|end|>"),
    (("<|return|>", "<|calls|>"), "<|end|>"),
    (("<|tool_response>",), "</s>"),
)


def end_token_ids(metadata: Config, tokens: Sequence[str]) -> tuple[int, ...]:
    """Return the ids that end a generation, the file's own end of sequence first.

    An id outside the vocabulary is ignored, as in llama.cpp.

    Args:
        metadata: The metadata of a GGUF file.
        tokens: The text of each token id; empty if the file has no tokenizer.

    Raises:
        CheckpointError: A field holds something other than an id.
    """
    id_of = {token: index for index, token in enumerate(tokens)}
    found = [_by_field(metadata, field, tokens) for field in _BY_FIELD]
    found += [id_of.get(text) for text in _BY_TEXT]
    for field, texts in _OF_INFILLING.items():
        index = _by_field(metadata, field, tokens)
        found.append(index if index is not None else next((id_of[text] for text in texts if text in id_of), None))
    ends = dict.fromkeys(index for index in found if index is not None)
    for signs, text in _NO_ENDS:
        if text in id_of and all(id_of.get(sign) in ends for sign in signs):
            ends.pop(id_of[text], None)
    return tuple(ends)


def _by_field(metadata: Config, field: str, tokens: Sequence[str]) -> int | None:
    index = metadata.read(int, f"tokenizer.ggml.{field}_token_id", None)
    is_valid = index is not None and index >= 0 and (not tokens or index < len(tokens))
    return index if is_valid else None
