"""How byte-level vocabularies split text before merging, by the name in a GGUF file's ``tokenizer.ggml.pre``.

The table follows ``llama_vocab::impl::load`` and ``llm_tokenizer_bpe`` of llama.cpp (src/llama-vocab.cpp). The splits
are spelled as in the models' own ``tokenizer.json``. Names of models that no reader of this package knows are left out.
A wrong split gives plausible but worse text, so an unknown name is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
_SEED = _QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BY_CASE = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+TAIL|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*TAIL"
_AFTER_WORDS = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = _BY_CASE.replace("TAIL", "") + r"|\p{N}" + _AFTER_WORDS
_GPT4O = _BY_CASE.replace("TAIL", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _AFTER_WORDS
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"""| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}""",
)
_LLAMA_CPP_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class Split:
    """One way of splitting text.

    Attributes:
        regexes: Each matches one piece; a later one splits what the earlier ones left. Empty for GPT-2's own regex,
            which is built into the byte-level pre-tokenizer.
        single_digits: Every digit is a separate piece.
        nfc: Text is converted to Unicode NFC first.
        ignore_merges: A piece that is itself a token becomes that token, and no merge is tried.
        add_bos: Text starts with the beginning-of-sequence token, unless the file decides differently.
    """

    regexes: tuple[str, ...] = ()
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Build the pre-tokenizer, whose pieces consist of byte-level characters."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps += [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in self.regexes]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.regexes))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_NAMES: Mapping[Split, tuple[str, ...]] = {
    Split(): (
        *("gpt-2", "mpt", "olmo", "phi-2", "jais", "trillion", "granite-docling", "exaone4", "mellum", "gigachat"),
        *("a.x-4.0",),
    ),
    Split(single_digits=True): ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
    Split(single_digits=True, nfc=True): ("command-r",),
    Split((_LLAMA3,), ignore_merges=True, add_bos=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    Split((_LLAMA3,)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    Split((_QWEN2,), nfc=True): ("qwen2", "deepseek-r1-qwen", "kormo", "megrez"),
    Split((_QWEN35,), nfc=True): ("qwen35",),
    Split((_QWEN2,)): ("stablelm2", "hunyuan", "solar-open", "grok-2"),
    Split((_SEED,)): ("seed-coder",),
    Split((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
    Split((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    Split(_DEEPSEEK_CODER): ("deepseek-coder",),
    Split(_DEEPSEEK3): ("deepseek-v3", "hunyuan-dense"),
    Split(_LLAMA_CPP_DEFAULT): ("default",),
}

SPLITS: Mapping[str, Split] = MappingProxyType({name: split for split, some in _NAMES.items() for name in some})
