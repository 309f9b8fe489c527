"""bundle.json: what a bundle holds, which files it has, where it came from.

Layout of the JSON object::

    format_version   5; 4 has no field drafter, and fewer presents beside an int8 cache; 3 knows Llama's layers only,
                     as a flat model; 2 has exits of exit_layer and draft_vocab only; 1 also lacks the field precision
    digest           sha256 of the rest, so that an edited file is noticed
    model            ModelSpec, as in spec_json.py
    exits            [every field of ExitSpec], ascending
    drafter          {spec: DrafterSpec, as in spec_json.py; graphs: [{file, inputs, outputs}]}, or null
    dtype            float32 | float16: activations, and weights and cache where precision does not say otherwise
    precision        {weights: {name: {bits, block_size, is_symmetric, has_offsets}}, kv_cache: float | int8};
                     side_columns and is_reordered besides, where a matrix has them
    max_length       positions that the rotary tables cover: the longest context
    segments         [{file, start, end, inputs, outputs}]: the contract, for readers without this package; with
                     packed: {file, inputs, outputs, onnxruntime}, where there is a form of several sequences
    files            {name: {bytes, sha256}}: every file but bundle.json and exit-profile.json
    source           {name, sha256}: the checkpoint
    tools            {package: version}: what wrote it
    origins          {name: {kind, is_kept, error}}: what matrices were in blocks of the checkpoint; absent without
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shortstack.graphs import names
from shortstack.graphs.assistant_contract import assistant_contract
from shortstack.graphs.contract import (
    CacheType,
    GraphContract,
    Port,
    cache_type,
    cache_types,
    drafter_contract,
    fuse_contract,
    segment_contract,
)
from shortstack.graphs.drafter_spec import DrafterSpec, check_drafter
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.origins import Origin, origins_from_json, origins_to_json
from shortstack.graphs.packing import LEAST_ONNXRUNTIME
from shortstack.graphs.plan import ExitSpec, Segment, SplitPlan
from shortstack.graphs.precision import Precision
from shortstack.graphs.read_file import read_json_object
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.graphs.spec_json import drafter_from_json, drafter_to_json, spec_from_json, spec_to_json

FORMAT_VERSION = 5
_READABLE_VERSIONS = (1, 2, 3, 4, 5)
_FLAT_VERSIONS = (1, 2, 3)
_LAST_WITHOUT_DRAFTER = 4
_REEXPORT = "restore the file or re-export the bundle"
_SHA256 = re.compile("[0-9a-f]{64}")
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f]")  # a plain file name on any system has none of these


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of a bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of bundle.json; see the module's docstring for the fields.

    Attributes:
        rewrites: Layers that use another one's int8 cache have a present for it, bound to the same buffer. Without it,
            as in formats before 5, the kernel copies the cache in each run.
    """

    spec: ModelSpec
    plan: SplitPlan
    dtype: DType
    max_length: int
    files: dict[str, FileEntry]
    source_name: str
    source_sha256: str
    tools: dict[str, str]
    precision: Precision = field(default_factory=Precision)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    rewrites: bool = True

    def contract(self, segment: Segment, *, is_packed: bool = False) -> GraphContract:
        """Return the contract of one of the plan's segments, in the form of one sequence or of several."""
        kv_cache = self.precision.kv_cache
        return segment_contract(
            self.spec, self.plan, segment, self.dtype, kv_cache, is_packed=is_packed, rewrites=self.rewrites
        )

    def drafter_contracts(self) -> dict[str, GraphContract]:
        """Return the contracts of the drafter's graphs, by file; none without a drafter."""
        drafter = self.plan.drafter
        if drafter is None:
            return {}
        if drafter.shared:
            return {names.drafter_file(0): assistant_contract(self.spec, drafter, self.dtype, self.precision.kv_cache)}
        found = {
            names.drafter_file(stage): drafter_contract(self.spec, drafter, self.dtype, stage)
            for stage in range(drafter.stages)
        }
        if drafter.features:
            found[names.FUSE_FILE] = fuse_contract(self.spec, drafter, self.dtype)
        return found

    @property
    def has_packed_form(self) -> bool:
        """Whether the bundle holds its graphs in the form of several sequences too."""
        return packed_files(self.plan) <= self.files.keys()

    def cache_types(self, segment: Segment) -> dict[names.CacheOwner, CacheType]:
        """Return the element types of the caches that one of the plan's segments writes, by owner."""
        return cache_types(self.spec, segment, self.plan.exit_of(segment), self.dtype, self.precision.kv_cache)

    @property
    def cache_type(self) -> CacheType:
        """Element type of the layers' cache buffers."""
        return cache_type(self.dtype, self.precision.kv_cache)

    @property
    def weights_sha256(self) -> str:
        """The identity of the weights, which calibration and tuning results name."""
        return self.files[names.WEIGHTS_FILE].sha256

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, its digest included."""
        body: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": spec_to_json(self.spec),
            "exits": [asdict(e) for e in self.plan.exits],
            "drafter": None if self.plan.drafter is None else self._drafter_json(self.plan.drafter),
            "dtype": self.dtype,
            "precision": self.precision.to_json(),
            "max_length": self.max_length,
            "segments": [self._segment_json(s) for s in self.plan.segments],
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "source": {"name": self.source_name, "sha256": self.source_sha256},
            "tools": dict(sorted(self.tools.items())),
        }
        if self.origins:
            body["origins"] = origins_to_json(self.origins)
        return {"format_version": FORMAT_VERSION, "digest": _digest(body), **body}

    def _drafter_json(self, drafter: DrafterSpec) -> dict[str, Any]:
        graphs = [{"file": file, **_contract_json(own)} for file, own in self.drafter_contracts().items()]
        return {"spec": drafter_to_json(drafter), "graphs": graphs}

    def _segment_json(self, segment: Segment) -> dict[str, Any]:
        found = {
            "file": names.segment_file(segment.start, segment.end),
            "start": segment.start,
            "end": segment.end,
            **_contract_json(self.contract(segment)),
        }
        if self.has_packed_form:
            found["packed"] = {
                "file": names.packed_file(segment.start, segment.end),
                **_contract_json(self.contract(segment, is_packed=True)),
                "onnxruntime": ".".join(map(str, LEAST_ONNXRUNTIME)),
            }
        return found


def _contract_json(contract: GraphContract) -> dict[str, Any]:
    return {
        "inputs": [_port_json(p) for p in contract.inputs],
        "outputs": [_port_json(p) for p in contract.outputs],
    }


def _port_json(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}


def _digest(body: dict[str, Any]) -> str:
    content = {key: value for key, value in body.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and check a bundle.json.

    Raises:
        BundleError: The file is absent, not JSON, of another format version, edited, or inconsistent; names the field.
    """
    data = _read_object(path)
    try:
        manifest = _parse(path, data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(f"{path} lacks or misspells a field ({error!r})", remedy=_REEXPORT) from None
    except RequestError as error:
        raise BundleError(f"{path}: field exits: {error}", remedy=_REEXPORT) from None
    return manifest


def with_files(path: Path, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """Return the JSON object of a bundle.json with other ``files`` and the digest that follows from them.

    Every other field stays as it is on disk, so a bundle of an older format version keeps that version.

    Raises:
        BundleError: The file is absent, not JSON, of another format version, or edited.
    """
    data = _read_object(path)
    data["files"] = {name: asdict(entry) for name, entry in sorted(files.items())}
    data["digest"] = _digest(data)
    return data


def _read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a bundle.json, and check its version and its digest."""
    if not path.exists():
        raise BundleError(
            f"{path.parent} is not a bundle: it has no {names.MANIFEST_FILE}",
            remedy="make one with `shortstack export CHECKPOINT OUT --exit-layer E`",
        )
    data = read_json_object(path, BundleError, _REEXPORT)
    if "format_version" not in data:
        raise BundleError(f"{path} has no field format_version", expected=FORMAT_VERSION, remedy=_REEXPORT)
    if type(data["format_version"]) is not int or data["format_version"] not in _READABLE_VERSIONS:  # True == 1
        raise BundleError(
            f"{path}: field format_version",
            found=repr(data["format_version"]),
            expected=" or ".join(map(str, _READABLE_VERSIONS)),
            remedy="re-export the bundle, or install the shortstack version that wrote it",
        )
    if data.get("digest") != _digest(data):
        raise BundleError(f"{path}: field digest does not match the content, so the file was edited", remedy=_REEXPORT)
    return data


def _parse(path: Path, data: dict[str, Any]) -> Manifest:
    spec = spec_from_json(data["model"], f"{path}: model", is_flat=data["format_version"] in _FLAT_VERSIONS)
    exits = tuple(_read_exit(path, entry, spec, data["format_version"]) for entry in data["exits"])
    drafter = _read_drafter(path, data["drafter"], spec) if data["format_version"] > _LAST_WITHOUT_DRAFTER else None
    if data["dtype"] not in ("float32", "float16"):
        raise BundleError(
            f"{path}: field dtype", found=repr(data["dtype"]), expected="float32 or float16", remedy=_REEXPORT
        )
    files = {name: _read_file_entry(path, name, entry) for name, entry in data["files"].items()}
    for name in files:
        if name in ("", ".", "..") or _NOT_IN_NAMES.search(name):
            raise BundleError(f"{path}: files names {name!r}, which is not a plain file name", remedy=_REEXPORT)
    max_length = data["max_length"]
    if type(max_length) is not int or not 2 <= max_length <= spec.max_position_embeddings:
        raise BundleError(
            f"{path}: field max_length",
            found=repr(max_length),
            expected=f"2..{spec.max_position_embeddings}, the model's max_position_embeddings",
            remedy=_REEXPORT,
        )
    precision = Precision.from_json(data["precision"]) if data["format_version"] > 1 else Precision()
    manifest = Manifest(
        spec=spec,
        plan=SplitPlan(spec.num_hidden_layers, exits, drafter),
        dtype=data["dtype"],
        max_length=max_length,
        files=files,
        source_name=str(data["source"]["name"]),
        source_sha256=str(data["source"]["sha256"]),
        tools={str(k): str(v) for k, v in data["tools"].items()},
        precision=precision,
        origins=origins_from_json(data.get("origins", {}), precision.weights),
        rewrites=data["format_version"] > _LAST_WITHOUT_DRAFTER,
    )
    missing = sorted(required_files(manifest.plan) - files.keys())
    if missing:
        raise BundleError(f"{path}: field files does not list {', '.join(missing)}", remedy=_REEXPORT)
    return manifest


def _read_file_entry(path: Path, name: str, entry: dict[str, Any]) -> FileEntry:
    size, sha256 = entry["bytes"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise BundleError(
            f"{path}: field files.{name}",
            found=repr(entry),
            expected="bytes as an integer and sha256 as 64 hex digits",
            remedy=_REEXPORT,
        )
    return FileEntry(size, sha256)


def _read_exit(path: Path, entry: dict[str, Any], spec: ModelSpec, version: int) -> ExitSpec:
    layer, vocab = entry["exit_layer"], entry["draft_vocab"]
    if type(layer) is not int or not (vocab is None or (type(vocab) is int and 2 <= vocab <= spec.vocab_size)):
        raise BundleError(
            f"{path}: field exits",
            found=repr(entry),
            expected=f"an integer exit_layer, and a draft_vocab of null or 2..{spec.vocab_size}",
            remedy=_REEXPORT,
        )
    return ExitSpec(layer, vocab) if version < 3 else ExitSpec.from_json(entry)


def _read_drafter(path: Path, entry: object, spec: ModelSpec) -> DrafterSpec | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise BundleError(f"{path}: field drafter", found=repr(entry), expected="an object or null", remedy=_REEXPORT)
    drafter = drafter_from_json(entry["spec"], f"{path}: drafter.spec")
    try:
        check_drafter(drafter, spec)
    except ValueError as error:
        raise BundleError(f"{path}: drafter.spec: {error}", remedy=_REEXPORT) from None
    return drafter


def drafter_files(plan: SplitPlan) -> set[str]:
    """Return the files that a plan's drafter needs besides the weights."""
    drafter = plan.drafter
    if drafter is None:
        return set()
    found = {names.drafter_file(stage) for stage in range(drafter.stages)}
    if drafter.features:
        found.add(names.FUSE_FILE)
    if drafter.draft_vocab is not None:
        found.add(names.drafter_vocab_file())
    return found


def packed_files(plan: SplitPlan) -> set[str]:
    """Return the files of a plan's graphs in the form of several sequences."""
    return {names.packed_file(s.start, s.end) for s in plan.segments}


def required_files(plan: SplitPlan) -> set[str]:
    """Return the files without which a bundle of this plan cannot run."""
    graphs = {names.segment_file(s.start, s.end) for s in plan.segments}
    maps = {names.draft_vocab_file(e.exit_layer) for e in plan.exits if e.draft_vocab is not None}
    return graphs | maps | drafter_files(plan) | {names.WEIGHTS_FILE, names.TOKENIZER_FILE}
