"""The export itself: a checkpoint in, a bundle out, nothing half-written in between."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.arch import resolve
from shortstack.export.arch.architecture import Architecture
from shortstack.export.checkpoint import Checkpoint, open_checkpoint
from shortstack.export.checkpoint.checkpoint import notes
from shortstack.export.draft_vocab import choose_draft_vocab, read_draft_text
from shortstack.export.drafters import Drafter, ModelOfDrafter, open_drafter
from shortstack.export.drafters.store import store_drafter
from shortstack.export.exit_plan import plan_exits
from shortstack.export.kept_blocks import REQUANTIZED_FORMAT, KeptBlocks, choose_blocks, dequantized_line
from shortstack.export.sources import matrix_sources
from shortstack.export.spec import DEFAULT_LONGEST, ExportSpec
from shortstack.export.tensors import ModelTensors
from shortstack.export.text_files import check_text_files, text_ends
from shortstack.export.weights import ExitWeights, store_exits, store_weights
from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle, check_free, open_bundle, staged_folder
from shortstack.graphs.drafter_weights import HEAD_IDS as DRAFTER_IDS
from shortstack.graphs.errors import RequestError
from shortstack.graphs.exit_parts import HEAD_IDS
from shortstack.graphs.genai_config import TextEnds, check_uncut
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.ir.write_bundle import tool_versions, write_bundle
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.plan import SplitPlan
from shortstack.graphs.precision import Precision
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.progress import progress_stages

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint that was opened and checked, and what is to be made of it; no weight of the model was read yet.

    Attributes:
        checkpoint: The checkpoint.
        arch: Its family.
        spec: The model.
        plan: Where it is cut.
        exit_weights: Weights of trained exits, and the ids of trimmed heads.
        max_length: Longest context, in positions.
        blocks: Which matrices keep the checkpoint's blocks.
        files: The content of the bundle's other files, by name.
        ends: The tokens around a text, for onnxruntime-genai; None where nothing is written for it.
        drafter: A trained drafter; None without one.
    """

    checkpoint: Checkpoint
    arch: Architecture
    spec: ModelSpec
    plan: SplitPlan
    exit_weights: ExitWeights
    max_length: int
    blocks: KeptBlocks
    files: Mapping[str, bytes]
    ends: TextEnds | None = None
    drafter: Drafter | None = None

    def manifest(self, request: ExportSpec, dtype: DType, source_sha256: str) -> Manifest:
        """Return the manifest of a bundle of floats; files and formats are filled in when they are written."""
        return Manifest(
            spec=self.spec,
            plan=self.plan,
            dtype=dtype,
            max_length=self.max_length,
            files={},
            source_name=_source_name(request),
            source_sha256=source_sha256,
            tools=tool_versions(),
        )


def open_model(request: ExportSpec) -> OpenedModel:
    """Open a checkpoint and decide what becomes of it; errors as in :func:`export_bundle`."""
    if request.draft_text is not None:
        read_draft_text(request.draft_text)  # before a download, not after
    checkpoint = _open(request)
    arch, spec = resolve(checkpoint)
    if request.genai:
        check_uncut(spec)
    plan, exit_weights = plan_exits(request, checkpoint, spec)
    max_length = _max_length(request, spec)
    blocks, sources = KeptBlocks(), matrix_sources(arch, spec)
    if request.keep_blocks:
        blocks = choose_blocks(checkpoint, sources)
    elif (line := dequantized_line(checkpoint, sources)) is not None:
        log.warning(line)
    for note in notes(checkpoint):
        log.warning(note)
    files = checkpoint.files()
    check_text_files(checkpoint.source, files)
    ends = text_ends(checkpoint.source, files) if request.genai else None
    exit_weights = _with_draft_vocabs(exit_weights, request, plan, spec, files)
    files = {**files, **_id_maps(plan, exit_weights)}
    drafter = None
    if request.drafter is not None:
        model = ModelOfDrafter(checkpoint, spec, arch)
        options = {"follow_links": request.follow_links, "allow_pickle": request.allow_pickle}
        drafter = open_drafter(request.drafter, model, **options)
        plan = replace(plan, drafter=drafter.spec)
        if drafter.spec.draft_vocab is not None:
            files[names.drafter_vocab_file()] = npy_bytes(drafter.part(DRAFTER_IDS))
    return OpenedModel(checkpoint, arch, spec, plan, exit_weights, max_length, blocks, files, ends, drafter)


def export_bundle(request: ExportSpec, tell: Callable[[KeptBlocks], None] = lambda blocks: None) -> Bundle:
    """Cut a checkpoint into a bundle.

    Args:
        request: What to export, and how.
        tell: Called with what became of each matrix, if the checkpoint's blocks were to be kept.

    Returns:
        The finished bundle.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        UnsupportedError: It can be read, but not exported.
        RequestError: An option does not fit the model.
        BundleError: The output folder is in the way.
    """
    check_free(request.out, request.overwrite)  # before a download, not after
    with progress_stages() as stage:
        model = open_model(request)
        tensors = ModelTensors(model.checkpoint, model.arch, model.spec, model.blocks, request.dtype)
        with staged_folder(request.out, overwrite=request.overwrite) as folder:
            with WeightStore(folder) as store:
                advance = stage("Writing weights", model.spec.num_hidden_layers)
                store_weights(tensors, request.dtype, model.max_length, store, advance)
                own_format = REQUANTIZED_FORMAT if store.formats else None
                store_exits(tensors, model.plan, model.exit_weights, request.dtype, store, own_format)
                if model.drafter is not None:
                    store_drafter(model.drafter, model.spec, model.max_length, request.dtype, store, own_format)
            blocks = model.blocks.measured(tensors.errors)
            advance = stage("Hashing the checkpoint", 1)
            manifest = model.manifest(request, request.dtype, model.checkpoint.digest())
            advance(1)
            manifest = replace(manifest, precision=Precision(store.formats), origins=blocks.origins())
            write_bundle(folder, manifest, store, model.files, stage, model.ends)
    if request.keep_blocks:
        tell(blocks)
    return open_bundle(request.out)


def _with_draft_vocabs(
    exit_weights: dict[str, npt.NDArray[np.generic]],
    request: ExportSpec,
    plan: SplitPlan,
    spec: ModelSpec,
    files: Mapping[str, bytes],
) -> dict[str, npt.NDArray[np.generic]]:
    """Return the exits' weights with the token ids of those trimmed heads whose ids no checkpoint gave."""
    trimmed = {names.exit_weight(e.exit_layer, HEAD_IDS) for e in plan.exits if e.draft_vocab is not None}
    missing = trimmed - exit_weights.keys()
    if not missing:
        return exit_weights
    assert request.draft_vocab is not None
    ids = choose_draft_vocab(files, request.draft_text, request.draft_vocab, spec.vocab_size)
    return exit_weights | dict.fromkeys(missing, ids)


def _id_maps(plan: SplitPlan, exit_weights: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, bytes]:
    """Return the files that map the rows of trimmed exit heads to token ids, by name."""
    files = {}
    for exit_spec in plan.exits:
        if exit_spec.draft_vocab is not None:
            ids = exit_weights[names.exit_weight(exit_spec.exit_layer, HEAD_IDS)]
            files[names.draft_vocab_file(exit_spec.exit_layer)] = npy_bytes(ids)
    return files


def npy_bytes(array: npt.NDArray[np.generic]) -> bytes:
    """Return the content of the file that ``numpy.save`` writes."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _open(request: ExportSpec) -> Checkpoint:
    checkpoint = open_checkpoint(
        request.checkpoint,
        revision=request.revision,
        follow_links=request.follow_links,
        allow_pickle=request.allow_pickle,
    )
    return checkpoint if request.adapter is None else AdaptedCheckpoint(checkpoint, request.adapter)


def _source_name(request: ExportSpec) -> str:
    """Return what a bundle says it was made from: names, without the folders they lie in."""
    path = Path(request.checkpoint).expanduser()
    name = path.name if path.exists() else request.checkpoint
    folders = [folder for folder in (request.adapter, request.exits) if folder is not None]
    others = [folder.resolve().name for folder in folders]
    if request.drafter is not None:
        path = Path(request.drafter).expanduser()
        others.append(path.resolve().name if path.exists() else request.drafter)
    return " + ".join((name, *others))


def _max_length(request: ExportSpec, spec: ModelSpec) -> int:
    if request.max_length is None:
        if spec.max_position_embeddings > DEFAULT_LONGEST:
            log.warning(
                "the model's context is %d tokens, the bundle's %d; --max-length asks for more",
                spec.max_position_embeddings,
                DEFAULT_LONGEST,
            )
        return min(spec.max_position_embeddings, DEFAULT_LONGEST)
    if request.max_length > spec.max_position_embeddings:
        raise RequestError(
            "--max-length is beyond what the model was made for",
            found=request.max_length,
            expected=f"at most max_position_embeddings = {spec.max_position_embeddings}",
        )
    return request.max_length
