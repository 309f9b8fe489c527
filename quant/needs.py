"""What a quantization needs of disk and memory, compared with what there is before anything is written."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.graphs.layer_weights import matrix_parts, stored_shapes
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import DType
from shortstack.quant.engine import Job
from shortstack.quant.float_tensors import float_tensors
from shortstack.quant.preset import Assignment
from shortstack.quant.source import SLICE_ROWS, Source

_FLOAT_BYTES = 4
_VALUE_BYTES: dict[DType, int] = {"float32": 4, "float16": 2}
_WIDEST_KEPT = BlockFormat(8, 16)  # of the blocks of a checkpoint
_OTHER_FILES = 64 << 20  # graphs, tokenizer
_BASE = 300 << 20  # the interpreter with its libraries
# Bytes for each weight, measured with samples/bench/straight.py and rounded up.
_GROUP = 8  # of the matrices of one input, without text: floats, how they were stored, codes
_SLICE = 24  # of some rows of a vocabulary
_LAYER = 16  # of a layer, with text: its floats twice, those of the session that runs it, and its packed copies
_GRAM = 30  # of the square of the widest input: its gram matrix, the sum in float64, and GPTQ's factors


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a job needs.

    Attributes:
        disk: Where the bundle is written.
        temporary: In the folder for temporary files.
        memory: Beside pages that are mapped from files.
    """

    disk: int
    temporary: int
    memory: int


def estimate(job: Job, assignment: Assignment) -> Needs:
    """Return what a job needs, on the safe side."""
    source, spec = job.source, job.source.spec
    stored = _stored_bytes(source, assignment, job.dtype)
    layers = [
        stored_shapes(spec.weights(layer), spec.layers[layer].attention) for layer in range(spec.num_hidden_layers)
    ]
    matrices = [
        {part: shapes[part] for part in matrix_parts(spec.weights(layer))} for layer, shapes in enumerate(layers)
    ]
    vocabulary = _SLICE * SLICE_ROWS * spec.hidden_size
    if not job.runs_layers:
        group = max((_group_weights(parts) for parts in matrices), default=0)
        return Needs(stored, 0, _BASE + max(_GROUP * group, vocabulary) + _held_bytes(source, assignment))
    assert job.rows is not None
    layer = max((sum(math.prod(shape) for shape in parts.values()) for parts in matrices), default=0)
    widest = max((shape[1] for parts in matrices for shape in parts.values()), default=0)
    stream = _FLOAT_BYTES * job.rows.size * spec.hidden_size
    gram = _GRAM * widest**2 if job.method.uses_text else 0
    memory = _BASE + _LAYER * layer + gram + 3 * stream + vocabulary + _held_bytes(source, assignment)
    return Needs(stored + 2 * stream, _FLOAT_BYTES * layer, memory)


def check_needs(job: Job, assignment: Assignment, out: Path) -> None:
    """Compare what a job needs with what there is.

    Args:
        job: The job.
        assignment: The format of each matrix.
        out: The bundle to be written.

    Raises:
        RequestError: The disk or the memory is too small.
    """
    needs = estimate(job, assignment)
    for folder, wanted in ((_existing(out), needs.disk), (Path(tempfile.gettempdir()), needs.temporary)):
        free = _free_bytes(folder)
        if free < wanted:
            raise RequestError(
                f"{folder}: there is not enough room on this disk for the bundle",
                found=f"{free / 1e6:,.0f} MB free",
                expected=f"about {wanted / 1e6:,.0f} MB",
                remedy="make room, or choose another place (OUT, or TMPDIR for temporary files)",
            )
    free_memory = available_memory()
    if free_memory is not None and free_memory < needs.memory:
        raise RequestError(
            "there is not enough memory for this quantization",
            found=f"{free_memory / 1e9:.1f} GB available",
            expected=f"about {needs.memory / 1e9:.1f} GB",
            remedy="close other programs"
            + (", or add --method rtn --kv-cache float, which need no text and less memory" if job.runs_layers else ""),
        )


def available_memory() -> int | None:
    """Return the bytes of memory and swap that are free for a process; None where the system does not say."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()]
        fields = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
        return fields["MemAvailable:"] + fields.get("SwapFree:", 0)
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, macOS
        return None


def _stored_bytes(source: Source, assignment: Assignment, dtype: DType) -> int:
    """Return about how many bytes the finished bundle has."""
    spec, value_bytes, total = source.spec, _VALUE_BYTES[dtype], _OTHER_FILES
    formats = {**assignment.matrices, **assignment.exit_matrices, **assignment.tables}
    heads = {names.exit_weight(depth, "head.weight"): f for depth, f in assignment.draft_heads.items()}
    first, first_format = assignment.first_rows or (0, None)
    head = names.EMBED_TOKENS if spec.tie_word_embeddings else names.LM_HEAD
    for name in dict.fromkeys([*float_tensors(source.manifest), *heads]):
        rows, *columns = source.shape(name) if name in source else (spec.vocab_size, spec.hidden_size)
        wanted = heads.get(name, formats.get(name))
        if not columns:
            total += rows * value_bytes
        elif name in source.reader.kept_names:
            total += _block_bytes(_WIDEST_KEPT, rows, columns[0], value_bytes)
        elif wanted is None:
            total += rows * columns[0] * value_bytes
        else:
            if name == head and first_format is not None:
                total += first_format.stored_bytes(first, columns[0], value_bytes)
                rows -= first
            total += _block_bytes(wanted, rows, columns[0], value_bytes)
    return total


def _block_bytes(wanted: BlockFormat, rows: int, width: int, value_bytes: int) -> int:
    return wanted.fitted(width).stored_bytes(rows, width, value_bytes)


def _held_bytes(source: Source, assignment: Assignment) -> int:
    """Return the bytes of what is held until a vocabulary matrix is stored: the scales of all its rows."""
    spec = source.spec
    wanted = [f for f in (*assignment.matrices.values(), *assignment.draft_heads.values()) if f is not None]
    size = min((f.block_size for f in wanted), default=0)
    return 2 * (_FLOAT_BYTES + 1) * spec.vocab_size * spec.hidden_size // size if size else 0


def _group_weights(parts: dict[str, tuple[int, ...]]) -> int:
    """Return the weights of the largest group of matrices that have one input."""
    groups: dict[str, int] = {}
    for part, shape in parts.items():
        factor = names.side_factor(names.layer_weight(0, part))
        groups[factor] = groups.get(factor, 0) + math.prod(shape)
    return max(groups.values(), default=0)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _existing(out: Path) -> Path:
    """Return the nearest folder above a path that exists."""
    path = Path(os.path.abspath(out)).parent
    while not path.is_dir():
        path = path.parent
    return path
