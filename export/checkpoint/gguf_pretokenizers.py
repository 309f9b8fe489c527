"""How byte-level vocabularies split text before merging, by the name in a GGUF file's ``tokenizer.ggml.pre``.

The table follows ``llama_vocab::impl::load`` and ``llm_tokenizer_bpe`` of llama.cpp (src/llama-vocab.cpp). The splits
are spelled as in the models' own ``tokenizer.json``. Only names that occur in models of the llama architecture are
listed. A wrong split gives plausible but worse text, so an unknown name is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, pre_tokenizers

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Split:
    """One way of splitting text.

    Attributes:
        regex: Matches one piece. Empty for GPT-2's own regex, which is built into the byte-level pre-tokenizer.
        single_digits: Every digit is a separate piece.
        nfc: Text is converted to Unicode NFC first.
        ignore_merges: A piece that is itself a token becomes that token, and no merge is tried.
        add_bos: Text starts with the beginning-of-sequence token, unless the file decides differently.
    """

    regex: str = ""
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Build the pre-tokenizer, whose pieces consist of byte-level characters."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.regex:
            steps.append(pre_tokenizers.Split(Regex(self.regex), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.regex))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_GPT2_SPLIT = Split()
_DIGITS_SPLIT = Split(single_digits=True)
_LLAMA3_SPLIT = Split(_LLAMA3, ignore_merges=True, add_bos=True)
_QWEN2_SPLIT = Split(_QWEN2, nfc=True)

SPLITS: Mapping[str, Split] = MappingProxyType(
    {
        "gpt-2": _GPT2_SPLIT,
        "mpt": _GPT2_SPLIT,
        "olmo": _GPT2_SPLIT,
        "phi-2": _GPT2_SPLIT,
        "smollm": _DIGITS_SPLIT,
        "starcoder": _DIGITS_SPLIT,
        "refact": _DIGITS_SPLIT,
        "codeshell": _DIGITS_SPLIT,
        "llama-bpe": _LLAMA3_SPLIT,
        "llama3": _LLAMA3_SPLIT,
        "llama-v3": _LLAMA3_SPLIT,
        "falcon3": _LLAMA3_SPLIT,
        "pixtral": _LLAMA3_SPLIT,
        "dbrx": Split(_LLAMA3),
        "smaug-bpe": Split(_LLAMA3),
        "qwen2": _QWEN2_SPLIT,
        "deepseek-r1-qwen": _QWEN2_SPLIT,
        "tekken": Split(_TEKKEN, ignore_merges=True, add_bos=True),
    }
)
