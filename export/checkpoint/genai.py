"""Reads folders that onnxruntime-genai runs as if they were Hugging Face checkpoints: model.onnx, genai_config.json.

The graph is walked along its data (:mod:`shortstack.export.checkpoint.genai_walk`), its weights get the names that the
model's family has for them, and the bundle's graphs are built anew from the spec. The folder needs no config.json:
heads, windows, norms, factors and rotary frequencies are read out of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shortstack.export.arch.architecture import EMBEDDING, FINAL_NORM, LM_HEAD, Architecture
from shortstack.export.checkpoint.checkpoint import (
    ROPE_FACTORS,
    Progress,
    StoredBlocks,
    StoredExit,
    hash_files,
    unknown_tensor,
)
from shortstack.export.checkpoint.config import Config, parse_json_object, positive
from shortstack.export.checkpoint.genai_spec import family_of, lifted_spec
from shortstack.export.checkpoint.genai_walk import Walk
from shortstack.export.checkpoint.graph_reader import Product
from shortstack.export.checkpoint.hf import member
from shortstack.export.checkpoint.lifted_model import LiftedLayer, LiftedModel
from shortstack.export.checkpoint.onnx_graph import OnnxGraph, Tensor
from shortstack.export.checkpoint.onnx_matrix import Matrix, stored_blocks
from shortstack.export.checkpoint.resolved_tokenizer import MORE_FILES
from shortstack.export.checkpoint.tokenizer_files import complete_files
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.names import GENAI_CONFIG_FILE, TEXT_FILES
from shortstack.graphs.read_file import read_file
from shortstack.graphs.spec import ModelSpec

Floats = npt.NDArray[np.float32]
_AGAIN = "copy the folder again as a whole, or build it again"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the checkpoint: matrices or vectors, one under the other.

    Attributes:
        parts: Where its rows are.
        shape: Its shape.
        plus: What the family adds to each value, and the graph has added already.
    """

    parts: tuple[Matrix | Tensor | Floats, ...]
    shape: tuple[int, ...]
    plus: float = 0.0

    def floats(self) -> Floats:
        """Return the values, as the family's own checkpoints have them."""
        found = np.concatenate([_floats(part) for part in self.parts])
        return np.ascontiguousarray(found - np.float32(self.plus) if self.plus else found, np.float32)


class GenaiCheckpoint:
    """A folder with a genai_config.json; the methods are those of ``Checkpoint``.

    Args:
        folder: The folder.
        source: The name that the user gave.
        follow_links: Follow links that lead out of the folder.

    Raises:
        CheckpointError: A file is missing, damaged or outside the folder.
        UnsupportedError: The graph is none that this version can lift.
    """

    def __init__(self, folder: Path, source: str | None = None, *, follow_links: bool = False) -> None:
        self.source = str(folder) if source is None else source
        self.folder_or_file = folder
        self._follow_links = follow_links
        self._config_file = self._member(GENAI_CONFIG_FILE)
        config = Config(
            parse_json_object(read_file(self._config_file, CheckpointError, _AGAIN), self._config_file),
            str(self._config_file),
        )
        model = _section(config, "model")
        decoder = _section(model, "decoder")
        self._graph = OnnxGraph(self._member(_file_name(decoder)), follow_links=follow_links)
        inputs, outputs = _names(decoder, "inputs"), _names(decoder, "outputs")
        side = {inputs.get(name, name) for name in ("attention_mask", "position_ids")}
        walk = Walk(self._graph, inputs.get("input_ids", "input_ids"), outputs.get("logits", "logits"), side)
        lifted = walk.model()
        context = positive(model, "context_length")
        spec, factors = lifted_spec(lifted, self._graph, model.read(str, "type"), context)
        pairs = frozenset(layer.is_interleaved for layer in lifted.layers if layer.rope is not None)
        arch, fields, self._spec = family_of(spec, pairs, str(self._graph.path))
        ids = {name: model.data[name] for name in _TOKEN_IDS if model.data.get(name) is not None}
        self.config = Config({**fields, **ids}, str(self._config_file))
        self._stored = stored_tensors(arch, self._spec, lifted)
        if factors is not None:
            self._stored[ROPE_FACTORS] = Stored((factors,), factors.shape)

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._of(name).shape

    def tensor(self, name: str) -> Floats:
        """Read one tensor as C-contiguous float32."""
        return self._of(name).floats()

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return how a tensor is quantized, without reading its data; None if it is stored as floats."""
        parts = self._of(name).parts
        matrices = tuple(part for part in parts if isinstance(part, Matrix))
        return stored_blocks(matrices) if matrices and len(matrices) == len(parts) else None

    def exits(self, spec: ModelSpec) -> tuple[StoredExit, ...]:
        """Return an empty tuple: the format has no exits."""
        return ()

    def files(self) -> dict[str, bytes]:
        """Return the content of the tokenizer's files that exist, and always a generation config."""
        folder, follow = self.folder_or_file, self._follow_links
        paths = {name: member(folder, name, follow_links=follow) for name in (*TEXT_FILES, *MORE_FILES)}
        found = {name: read_file(path, CheckpointError, _AGAIN) for name, path in paths.items() if path is not None}
        return complete_files(found, self.config, str(folder), is_resolved=False)

    def digest(self, progress: Progress | None = None) -> str:
        """Return the SHA-256 over genai_config.json, the graph and its data, each preceded by its name and size."""
        return hash_files((self._config_file, self._graph.path, *self._graph.data_files), label=True, progress=progress)

    def _of(self, name: str) -> Stored:
        if name not in self._stored:
            raise unknown_tensor(name, self.folder_or_file)
        return self._stored[name]

    def _member(self, name: str) -> Path:
        path = member(self.folder_or_file, name, follow_links=self._follow_links)
        if path is None:
            raise CheckpointError(f"{self.folder_or_file} has no {name}", remedy=_AGAIN)
        return path


def stored_tensors(arch: Architecture, spec: ModelSpec, model: LiftedModel) -> dict[str, Stored]:
    """Return where each tensor of a family's checkpoint is in a lifted model, by its name there."""
    ends: dict[str, Matrix | Tensor | Floats] = {EMBEDDING: model.embedding, FINAL_NORM: model.final_norm.weight}
    if not spec.tie_word_embeddings:
        ends[LM_HEAD] = model.head
    found = {
        arch.tensor_name(role): Stored((part,), _shape(part), arch.source(role).plus) for role, part in ends.items()
    }
    for layer, lifted in enumerate(model.layers):
        roles = layer_roles(lifted)
        for weight in spec.weights(layer):
            source = arch.source(weight.role)
            kind = weight.role.rsplit(".", 1)[1]
            parts = tuple(roles[f"{name}.{kind}"] for name in source.stacked) or (roles[weight.role],)
            shapes = [_shape(part) for part in parts]
            shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            found[arch.tensor_name(weight.role, layer)] = Stored(parts, shape, source.plus)
    return found


def layer_roles(lifted: LiftedLayer) -> dict[str, Matrix | Tensor | Floats]:
    """Return the weights of a lifted layer by the roles of :mod:`shortstack.graphs.layer_weights`."""
    products: Mapping[str, Product] = {
        "q_proj": lifted.q,
        "k_proj": lifted.k,
        "v_proj": lifted.v,
        "o_proj": lifted.o,
        **lifted.mlp,
    }
    roles: dict[str, Matrix | Tensor | Floats] = {}
    for name, product in products.items():
        roles[f"{name}.weight"] = product.matrix
        if (bias := product.bias_part()) is not None:
            roles[f"{name}.bias"] = bias
    roles |= {f"{_NORM_ROLES[name]}.weight": norm.weight for name, norm in lifted.norms.items()}
    if lifted.qk_norms is not None:
        roles["q_norm.weight"], roles["k_norm.weight"] = (norm.weight for norm in lifted.qk_norms)
    return roles


_NORM_ROLES = {
    "before_attention": "input_norm",
    "after_attention": "attention_out_norm",
    "before_mlp": "post_attention_norm",
    "after_mlp": "mlp_out_norm",
}


def _shape(part: Matrix | Tensor | Floats) -> tuple[int, ...]:
    return tuple(part.shape)


def _floats(part: Matrix | Tensor | Floats) -> Floats:
    if isinstance(part, Matrix):
        return part.floats()
    return np.asarray(part.read() if isinstance(part, Tensor) else part, np.float32)


def _section(config: Config, key: str) -> Config:
    found = config.section(key)
    if found is None:
        raise UnsupportedError(
            f"{config.where(key)} is missing",
            expected="the config of a model with one decoder",
            remedy="export the checkpoint that the folder was built from",
        )
    return found


def _file_name(decoder: Config) -> str:
    name = decoder.read(str, "filename")
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(
            decoder.where("filename"), found=repr(name), expected="a plain file name in the same folder"
        )
    return name


def _names(decoder: Config, key: str) -> dict[str, Any]:
    found = decoder.section(key)
    if found is None:
        return {}
    return {name: found.read(str, name) for name in found.data if isinstance(found.data[name], str)}
