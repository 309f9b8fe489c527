"""What `shortstack inspect` knows about a bundle, as plain frozen data that text, JSON and HTML share.

Everything is computed from bundle.json and the sizes in it: no graph is opened and no runtime imported, so it answers
at once.

The draft cost of an exit is a prediction: decoding one token reads every weight it uses once, so with l_i the bytes of
layer i, h_d those of the exit's head and h those of the final head,

    f(E) = (l_0 + .. + l_(E-1) + h_d) / (l_0 + .. + l_(L-1) + h)

which is (E * l + h_d) / (L * l + h) where all layers are alike (Leviathan et al., https://arxiv.org/abs/2211.17192,
call it c). Bytes are those that the bundle's precision stores. Only a measurement says what a draft costs on a machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.contract import Port
from shortstack.graphs.kv_map import IteratedGroup, borrowed, consumers, is_kv_complete, iterated_groups, producers
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.origins import Origin
from shortstack.graphs.plan import ExitSpec, Segment
from shortstack.graphs.precision import Precision
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.runtime.inspection.drafter import DrafterReport, drafter_report
from shortstack.runtime.inspection.parameters import (
    LayerParameters,
    ModelParameters,
    layer_parameters,
    model_parameters,
)
from shortstack.runtime.inspection.sizes import (
    LayerBytes,
    block_cache_bytes_per_token,
    cache_bytes_per_token,
    draft_heads_bytes,
    drafter_bytes,
    exit_head,
    final_head,
    layer_bytes,
    layers_bytes,
    other_bytes,
    read_bytes,
    stored_as,
    vocabulary_bytes,
)


@dataclass(frozen=True, slots=True)
class HeadReport:
    """An exit node, or the final head.

    Attributes:
        exit_layer: Layers run before it; L for the final head.
        is_final: It is the final head.
        rows: Rows of its LM head: N of a trimmed one, V otherwise.
        kv_complete: Nothing above it owns a cache. True of the final head.
        stored_as: How its matrix is stored: a type of floats, or blocks.
        owns_weights: Its matrix belongs to it alone, not to another head or the embedding; exits with equal matrices
            store one.
        weight_bytes: What it reads for one position, norm and branch included.
        draft_cost: Predicted cost of one draft step that ends here, in plain steps; 1 for the final head.
        exit_spec: What kind of exit it is; None for the final head.
        kv_owner: What its own cache is called in the graph, that of a block; None without one.
        cache_bytes_per_token: What one position takes in that cache.
    """

    exit_layer: int
    is_final: bool
    rows: int
    kv_complete: bool
    stored_as: str
    owns_weights: bool
    weight_bytes: int
    draft_cost: float
    exit_spec: ExitSpec | None = None
    kv_owner: str | None = None
    cache_bytes_per_token: int = 0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One decoder layer.

    Attributes:
        layer: Its number.
        segment: Index of the segment that holds it.
        kv_layer: The layer whose K,V it uses; itself when it owns them.
        consumers: Other layers that use its K,V.
        window: How many positions it sees, its own included; 0 is all.
        sees_itself: It sees its own position.
        parameters: Its parameters.
        weight_bytes: What they take in weights.data.
        part_bytes: The same, part by part.
    """

    layer: int
    segment: int
    kv_layer: int
    consumers: tuple[int, ...]
    window: int
    sees_itself: bool
    parameters: LayerParameters
    weight_bytes: int
    part_bytes: LayerBytes

    @property
    def owns_kv(self) -> bool:
        """It has W_K, W_V and a cache of its own."""
        return self.kv_layer == self.layer


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One graph.

    Attributes:
        index: Position in the stack, 0 at the bottom.
        file: Its ONNX file.
        start: First layer.
        end: One past the last layer.
        head: The head that it ends in.
        kv_owned: Layers inside that own a cache; the head may own one too.
        kv_borrowed: Layers outside whose cache layers inside use.
        parameters: Of its layers, with the embedding in the first, and final norm and untied LM head in the last.
        parameter_share: Of the model's parameters; the segments' shares add up to 1.
        graph_bytes: Size of the ONNX file, without weights.
        cache_bytes_per_token: What one position takes in the caches it owns, its head's included.
        inputs: Tensors into the graph.
        outputs: Tensors out of it.
    """

    index: int
    file: str
    start: int
    end: int
    head: HeadReport
    kv_owned: tuple[int, ...]
    kv_borrowed: tuple[int, ...]
    parameters: int
    parameter_share: float
    graph_bytes: int
    cache_bytes_per_token: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What weights.data should hold by spec and precision, in bytes, and what it does hold.

    Attributes:
        embedding: The token embedding, also the LM head of a tied model.
        layers: All decoder layers.
        lm_head: An untied LM head.
        draft_heads: What exits have of their own, with the id maps of trimmed heads; equal heads are stored once.
        drafter: What a trained drafter has of its own; 0 without one.
        other: Rotary tables and the final norm.
        stored: Size of weights.data.
    """

    embedding: int
    layers: int
    lm_head: int
    draft_heads: int
    drafter: int
    other: int
    stored: int

    @property
    def predicted(self) -> int:
        """The sum by spec and precision."""
        return self.embedding + self.layers + self.lm_head + self.draft_heads + self.drafter + self.other

    @property
    def as_predicted(self) -> bool:
        """The file has that size, give or take 1% for alignment; if not, bundle.json does not tell all."""
        return abs(self.stored - self.predicted) <= 0.01 * self.predicted


@dataclass(frozen=True, slots=True)
class Report:
    """A bundle, described.

    Attributes:
        folder: Its path.
        format_version: Of bundle.json, as it is on the disk.
        verified: The sha256 of every file was checked.
        source_name: The checkpoint it was made from.
        source_sha256: The checkpoint's hash.
        tools: What wrote it, package to version.
        dtype: Of activations, and of weights and cache where ``precision`` does not say otherwise.
        precision: What is stored in blocks, and the type of the cache.
        origins: What matrices were in blocks of the checkpoint, by name.
        max_length: Longest context, in tokens.
        spec: The model.
        parameters: Of the whole model.
        weights: What weights.data holds.
        layers: Bottom to top.
        segments: Bottom to top.
        drafter: A trained drafter; None without one.
        iterated_groups: Layers that run in passes over a prompt, bottom to top.
        cache_bytes_per_token: Of all segments.
        files: Name to size in bytes, bundle.json not included.
        total_bytes: Of those files.
    """

    folder: str
    format_version: int
    verified: bool
    source_name: str
    source_sha256: str
    tools: dict[str, str]
    dtype: DType
    precision: Precision
    origins: Mapping[str, Origin]
    max_length: int
    spec: ModelSpec
    parameters: ModelParameters
    weights: WeightReport
    layers: tuple[LayerReport, ...]
    segments: tuple[SegmentReport, ...]
    drafter: DrafterReport | None
    iterated_groups: tuple[IteratedGroup, ...]
    cache_bytes_per_token: int
    files: dict[str, int]
    total_bytes: int

    @property
    def exits(self) -> tuple[HeadReport, ...]:
        """The exit nodes, without the final head."""
        return tuple(segment.head for segment in self.segments if not segment.head.is_final)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready data, computed totals included."""
        data = asdict(self)
        data["precision"] = self.precision.to_json()
        data["origins"] = {
            name: {
                "kind": o.kind,
                "fate": o.fate,
                "stored_as": str(self.precision.weights[name]),
                "error": o.error,
                "error_of": o.error_of,
            }
            for name, o in self.origins.items()
        }
        data["parameters"]["total"] = self.parameters.total
        data["weights"] |= {"predicted": self.weights.predicted, "as_predicted": self.weights.as_predicted}
        for layer, report in zip(data["layers"], self.layers, strict=True):
            layer["owns_kv"] = report.owns_kv
            layer["parameters"]["total"] = report.parameters.total
        return data


def build_report(bundle: Bundle, *, verified: bool = False) -> Report:
    """Describe an opened bundle.

    Args:
        bundle: The bundle.
        verified: It was opened with ``verify_hashes``.
    """
    manifest = bundle.manifest
    spec = manifest.spec
    segments = tuple(_segment(manifest, segment) for segment in manifest.plan.segments)
    segment_of = {layer: s.index for s in segments for layer in range(s.start, s.end)}
    return Report(
        folder=str(bundle.folder),
        format_version=_format_version(bundle),
        verified=verified,
        source_name=manifest.source_name,
        source_sha256=manifest.source_sha256,
        tools=dict(sorted(manifest.tools.items())),
        dtype=manifest.dtype,
        precision=manifest.precision,
        origins=manifest.origins,
        max_length=manifest.max_length,
        spec=spec,
        parameters=model_parameters(spec),
        weights=_weights(manifest),
        layers=tuple(
            LayerReport(
                layer=layer,
                segment=segment_of[layer],
                kv_layer=kv_layer,
                consumers=consumers(spec.kv_map, layer),
                window=spec.window(layer),
                sees_itself=spec.sees_itself(layer),
                parameters=layer_parameters(spec, layer),
                weight_bytes=layer_bytes(manifest, layer).total,
                part_bytes=layer_bytes(manifest, layer),
            )
            for layer, kv_layer in enumerate(spec.kv_map)
        ),
        segments=segments,
        drafter=drafter_report(manifest),
        iterated_groups=iterated_groups(spec.kv_map),
        cache_bytes_per_token=sum(segment.cache_bytes_per_token for segment in segments),
        files={name: entry.bytes for name, entry in sorted(manifest.files.items())},
        total_bytes=sum(entry.bytes for entry in manifest.files.values()),
    )


def _format_version(bundle: Bundle) -> int:
    """Return the version that the file has; the manifest in memory is always of the newest."""
    return int(json.loads((bundle.folder / names.MANIFEST_FILE).read_bytes())["format_version"])


def _segment(manifest: Manifest, segment: Segment) -> SegmentReport:
    spec, file = manifest.spec, names.segment_file(segment.start, segment.end)
    contract, model = manifest.contract(segment), model_parameters(spec)
    owned = producers(spec.kv_map, segment.start, segment.end)
    parameters = sum(layer_parameters(spec, layer).total for layer in range(segment.start, segment.end))
    parameters += model.embedding if segment.is_first else 0
    parameters += model.final_norm + model.lm_head if segment.is_last else 0
    head = _head(manifest, segment.end, manifest.plan.exit_of(segment))
    return SegmentReport(
        index=segment.index,
        file=file,
        start=segment.start,
        end=segment.end,
        head=head,
        kv_owned=owned,
        kv_borrowed=borrowed(spec.kv_map, segment.start, segment.end),
        parameters=parameters,
        parameter_share=round(parameters / model.total, 6),
        graph_bytes=manifest.files[file].bytes,
        cache_bytes_per_token=cache_bytes_per_token(manifest, owned) + head.cache_bytes_per_token,
        inputs=contract.inputs,
        outputs=contract.outputs,
    )


def _head(manifest: Manifest, end: int, exit_spec: ExitSpec | None) -> HeadReport:
    spec = manifest.spec
    own = None if exit_spec is None else exit_head(manifest, exit_spec)
    read = read_bytes(manifest, exit_spec)
    below = sum(layer_bytes(manifest, layer).total for layer in range(end))
    has_block = exit_spec is not None and exit_spec.branch == "block"
    is_below_block = any(e.branch == "block" and e.exit_layer > end for e in manifest.plan.exits)
    return HeadReport(
        exit_layer=end,
        is_final=exit_spec is None,
        rows=spec.vocab_size if exit_spec is None or exit_spec.draft_vocab is None else exit_spec.draft_vocab,
        kv_complete=is_kv_complete(spec.kv_map, end) and not is_below_block,
        stored_as=stored_as(manifest, own or final_head(spec)),
        owns_weights=own is not None or (exit_spec is None and not spec.tie_word_embeddings),
        weight_bytes=read,
        draft_cost=round((below + read) / (layers_bytes(manifest) + read_bytes(manifest, None)), 6),
        exit_spec=exit_spec,
        kv_owner=names.exit_block(end) if has_block else None,
        cache_bytes_per_token=block_cache_bytes_per_token(manifest, exit_spec),
    )


def _weights(manifest: Manifest) -> WeightReport:
    return WeightReport(
        embedding=vocabulary_bytes(manifest, names.EMBED_TOKENS),
        layers=layers_bytes(manifest),
        lm_head=0 if manifest.spec.tie_word_embeddings else vocabulary_bytes(manifest, names.LM_HEAD),
        draft_heads=draft_heads_bytes(manifest),
        drafter=drafter_bytes(manifest),
        other=other_bytes(manifest),
        stored=manifest.files[names.WEIGHTS_FILE].bytes,
    )
