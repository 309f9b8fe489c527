"""The model families shortstack can export, one file each, listed here by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from shortstack.export.arch import (
    arcee,
    cohere2,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    gpt2,
    gpt_neox,
    granite,
    helium,
    hunyuan,
    lckv,
    llama,
    mimo,
    ministral3,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from shortstack.export.arch.architecture import EMBEDDING, LM_HEAD, Architecture, Source, expected_tensors, layer_shapes
from shortstack.export.arch.check import check_tensors
from shortstack.export.arch.missing import MISSING, REMEDIES
from shortstack.export.arch.quantized import check_not_quantized
from shortstack.export.checkpoint.checkpoint import Checkpoint
from shortstack.export.checkpoint.config import not_one_of
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.spec import ModelSpec

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "check_tensors",
    "expected_tensors",
    "layer_shapes",
    "resolve",
    "under_prefix",
]

_ALL = (
    llama.ARCH, lckv.ARCH, lckv.OPT_ARCH, lckv.CLA_ARCH, qwen2.ARCH, qwen3.ARCH, mistral.ARCH, mistral.MINISTRAL_ARCH,
    ministral3.ARCH, ministral3.WHOLE_ARCH, gemma.ARCH, gemma2.ARCH, gemma3.ARCH, gemma3.WHOLE_ARCH, gemma4.ARCH,
    gemma4.WHOLE_ARCH, phi3.ARCH, smollm3.ARCH, olmo2.ARCH, olmo2.OLMO3_ARCH, granite.ARCH, gpt2.ARCH, gpt_neox.ARCH,
    arcee.ARCH, cohere2.ARCH, ernie4_5.ARCH, exaone4.ARCH, glm4.ARCH, helium.ARCH, hunyuan.ARCH, mimo.ARCH,
    seed_oss.ARCH, stablelm.ARCH, starcoder2.ARCH,
)  # fmt: skip
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({arch.model_type: arch for arch in _ALL})


def resolve(checkpoint: Checkpoint) -> tuple[Architecture, ModelSpec]:
    """Find a checkpoint's family, read its spec, and check its tensors against the spec.

    Raises:
        CheckpointError: The config is not valid, or the tensors do not fit it.
        UnsupportedError: This version cannot export the family, or an option of it.
    """
    model_type = checkpoint.config.read(str, "model_type")
    if model_type not in ARCHITECTURES:
        raise _unknown(checkpoint.config.where("model_type"), model_type)
    arch = ARCHITECTURES[model_type]
    check_not_quantized(checkpoint)
    spec = arch.read_spec(checkpoint.config)
    arch = _with_stored_embedding(checkpoint, _with_stored_prefix(checkpoint, arch), spec)
    check_tensors(checkpoint, arch, spec)
    return arch, spec


def under_prefix(arch: Architecture, prefix: str) -> Architecture:
    """Return a family, its tensors under one of its prefixes instead of the first."""
    usual = arch.prefixes[0]

    def moved(source: Source) -> Source:
        is_prefixed = source.tensor.startswith(usual)
        return replace(source, tensor=prefix + source.tensor.removeprefix(usual)) if is_prefixed else source

    return replace(arch, sources=MappingProxyType({role: moved(source) for role, source in arch.sources.items()}))


def _with_stored_prefix(checkpoint: Checkpoint, arch: Architecture) -> Architecture:
    """Return the family, its tensors under the prefix that the checkpoint has."""
    names = checkpoint.names()
    for prefix in arch.prefixes:
        found = under_prefix(arch, prefix)
        if found.tensor_name(EMBEDDING) in names:
            head = found.tensor_name(LM_HEAD)
            own = [name for name in names if name.endswith(f".{head}")]  # language_model.lm_head.weight
            if head not in names and len(own) == 1:
                return replace(found, sources=MappingProxyType({**found.sources, LM_HEAD: Source(own[0])}))
            return found
    return arch


def _unknown(where: str, model_type: str) -> UnsupportedError:
    """Return the error for a family that is not supported; it says what is missing, where that is known."""
    missing = MISSING.get(model_type)
    if missing is None:
        return not_one_of(where, model_type, ARCHITECTURES, "export a model of one of these families")
    *first, last = missing
    needs = f"{', '.join(first)} and {last}" if first else last
    return not_one_of(
        f"{where}: this version cannot export models with {needs}",
        model_type,
        ARCHITECTURES,
        next((REMEDIES[what] for what in missing if what in REMEDIES), "export a model of one of these families"),
    )


def _with_stored_embedding(checkpoint: Checkpoint, arch: Architecture, spec: ModelSpec) -> Architecture:
    """Return the family; where a tied model stores its one matrix as the LM head, that is the embedding's name, too."""
    embedding, head = arch.tensor_name(EMBEDDING), arch.tensor_name(LM_HEAD)
    names = checkpoint.names()
    if not spec.tie_word_embeddings or embedding in names or head not in names:
        return arch
    return replace(arch, sources=MappingProxyType({**arch.sources, EMBEDDING: Source(head)}))
