"""The last step of writing a bundle: from stored weights to graphs, further files and bundle.json.

``export`` and ``quantize`` each fill a :class:`WeightStore` in their own way; from there on they do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from shortstack import __version__
from shortstack.graphs import names
from shortstack.graphs.bundle import describe_files, open_bundle, write_manifest
from shortstack.graphs.errors import ContractError
from shortstack.graphs.genai_config import TextEnds, genai_config
from shortstack.graphs.ir.drafter import drafter_models
from shortstack.graphs.ir.lint import lint
from shortstack.graphs.ir.segment import segment_model
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.ir.whole import whole_model
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.packing import can_pack
from shortstack.progress import Stage


def tool_versions() -> dict[str, str]:
    """Return the versions of what writes a bundle, as :attr:`Manifest.tools` lists them."""
    return {"shortstack": __version__, **{package: version(package) for package in ("numpy", "onnx", "onnx-ir")}}


def write_bundle(
    folder: Path,
    manifest: Manifest,
    store: WeightStore,
    files: Mapping[str, bytes],
    stage: Stage,
    genai: TextEnds | None = None,
) -> Manifest:
    """Write all of a bundle but its weights, which are there already.

    Args:
        folder: Where the bundle is being written.
        manifest: What it holds; the field ``files`` is filled in here.
        store: Its weights, in ``folder``; complete.
        files: The content of its other files, by name: tokenizer, chat template, id maps.
        stage: Starts a stage of the progress bar.
        genai: The tokens around a text: writes what onnxruntime-genai needs, too. None does not.

    Returns:
        The manifest as it was written.

    Raises:
        ContractError: A graph would not verify what it drafts.
        UnsupportedError: onnxruntime-genai cannot run the model.
    """
    plan, spec = manifest.plan, manifest.spec
    advance = stage("Building graphs", len(plan.segments) + (genai is not None))
    forms = (False, True) if can_pack(spec) else (False,)
    for segment in plan.segments:
        for is_packed in forms:
            kv_cache = manifest.precision.kv_cache
            model = segment_model(spec, plan, segment, manifest.dtype, store, kv_cache, is_packed=is_packed)
            name = (names.packed_file if is_packed else names.segment_file)(segment.start, segment.end)
            lint(model, name)
            ir.save(model, folder / name)
        advance(1)
    if plan.drafter is not None:
        kv_cache = manifest.precision.kv_cache
        for name, model in drafter_models(spec, plan.drafter, manifest.dtype, store, kv_cache).items():
            lint(model, name)
            ir.save(model, folder / name)
    if genai is not None:
        whole = whole_model(manifest.spec, plan, manifest.dtype, store, manifest.precision.kv_cache)
        lint(whole, names.GENAI_GRAPH_FILE)
        ir.save(whole, folder / names.GENAI_GRAPH_FILE)
        content = genai_config(manifest.spec, manifest.max_length, genai)
        (folder / names.GENAI_CONFIG_FILE).write_bytes(content)
        advance(1)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    advance = stage("Hashing", 1)
    written = replace(manifest, files=describe_files(folder))
    write_manifest(folder, written)
    advance(1)
    _check_written(folder)
    return written


def _check_written(folder: Path) -> None:
    """Check that a bundle opens, and each of its graphs, before it gets its name.

    Raises:
        BundleError: bundle.json does not say what is there, or is not valid.
        ContractError: A graph does not have the inputs and outputs that bundle.json says.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    contracts = {folder / name: contract for name, contract in manifest.drafter_contracts().items()}
    for segment in manifest.plan.segments:
        for is_packed in (False, True) if manifest.has_packed_form else (False,):
            path = bundle.graph_path(segment, is_packed=is_packed)
            contracts[path] = manifest.contract(segment, is_packed=is_packed)
    for path, contract in contracts.items():
        graph = ir.load(path).graph
        for found, wanted in ((graph.inputs, contract.inputs), (graph.outputs, contract.outputs)):
            names_found, names_wanted = [value.name for value in found], [port.name for port in wanted]
            if names_found != names_wanted:
                raise ContractError(path.name, found=names_found, expected=names_wanted)
