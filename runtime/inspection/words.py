"""How numbers, names and ports are put into words, the same in the text and on the page of `shortstack inspect`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shortstack.graphs import names
from shortstack.graphs.contract import Port
from shortstack.graphs.drafter_weights import drafter_matrices
from shortstack.graphs.exit_parts import exit_matrices
from shortstack.graphs.kv_map import IteratedGroup
from shortstack.graphs.layer_weights import matrix_parts
from shortstack.graphs.origins import grouped
from shortstack.graphs.spec import ModelSpec
from shortstack.runtime.inspection.report import HeadReport, Report, SegmentReport

_CACHE_PORT = re.compile(rf"(\D+)(\d+)\.({'|'.join(names.KV_PARTS)})")
_SHORT_HASH = 12


def size(count: int) -> str:
    """Return bytes in decimal units, as disks and networks count: ``513 B``, ``12.4 kB``, ``538 MB``, ``2.47 GB``."""
    return f"{count} B" if count < 1000 else f"{_scaled(count, ('kB', 'MB', 'GB', 'TB'))}"


def quantity(count: int) -> str:
    """Return a count in short: ``513``, ``12.4 k``, ``135 M``, ``1.24 B``."""
    return str(count) if count < 1000 else _scaled(count, ("k", "M", "B", "T"))


def _scaled(count: int, units: Sequence[str]) -> str:
    power = next((i for i in range(1, len(units)) if count < 999.5 * 1000**i), len(units))
    value, unit = count / 1000**power, units[power - 1]
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers with runs of them joined: ``0..7, 9``; ``-`` for none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}..{b}" if b > a else str(a) for a, b in runs) or "-"


def layers(start: int, end: int) -> str:
    """Return a run of layers: ``layers 0..7``, ``layer 8``."""
    return layers_of(range(start, end))


def layers_of(numbers: Sequence[int]) -> str:
    """Return layers with runs of them joined: ``layers 0..7, 9``."""
    return f"layer{'s' * (len(numbers) > 1)} {ranges(numbers)}"


def printable(text: str) -> str:
    """Return foreign text with control and direction characters written out, so that it cannot act on a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def short_hash(sha256: str) -> str:
    """Return the first digits of a hash, enough to tell two apart."""
    return printable(sha256)[:_SHORT_HASH]


def head_words(head: HeadReport, vocab_size: int) -> str:
    """Return what a head is: ``exit after 8 layers, 8,192 of 49,152 rows``."""
    if head.is_final:
        return f"final head, {head.rows:,} rows"
    trimmed = head.rows != vocab_size
    kind = f"trimmed head, {head.rows:,} of {vocab_size:,} rows" if trimmed else "full head"
    own = ", its own" if head.owns_weights and not trimmed else ""
    return f"exit after {head.exit_layer} layer{'s' * (head.exit_layer != 1)}, {branch_words(head)}{kind}{own}"


def branch_words(head: HeadReport) -> str:
    """Return what an exit has besides final norm and head: ``linear branch of token and state, own norm, ``."""
    exit_spec = head.exit_spec
    if exit_spec is None:
        return ""
    words = []
    if head.kv_owner is not None:
        words.append("a layer with a cache of its own")
    elif exit_spec.branch != "none":
        seen = [name for name, sees in (("token", exit_spec.sees_token), ("state", exit_spec.sees_state)) if sees]
        words.append(f"{exit_spec.branch} branch" + (f" that sees {' and '.join(seen)}" if seen else ""))
    if exit_spec.norm != "final":
        words.append("its own norm" if exit_spec.norm == "own" else "no norm")
    if exit_spec.has_gate:
        words.append("gate")
    if exit_spec.head == "low_rank":
        words.append(f"rank {exit_spec.head_rank}")
    return "".join(f"{word}, " for word in words)


def model_words(report: Report) -> str:
    """Return the model's shape in one line."""
    spec = report.spec
    attentions = [layer.attention for layer in spec.layers]
    heads = " or ".join(dict.fromkeys(f"{a.heads} heads, {a.kv_heads} KV heads of {a.head_dim}" for a in attentions))
    widths = " or ".join(dict.fromkeys(str(layer.mlp.width) for layer in spec.layers))
    tied = "tied" if spec.tie_word_embeddings else "untied"
    return (
        f"{printable(spec.model_type)} · {spec.num_hidden_layers} layers · hidden {spec.hidden_size} · {heads} · "
        f"MLP {widths} · vocabulary {spec.vocab_size:,} ({tied}) · "
        f"{quantity(report.parameters.total)} parameters"
    )


def precision_words(report: Report) -> str:
    """Return what a bundle computes and stores with: ``float32 activations, int8 KV cache; 120 matrices int4, ...``."""
    precision = report.precision
    cache = " and cache" if precision.kv_cache == "float" else f", {precision.kv_cache} KV cache"
    counts = Counter(map(str, precision.weights.values()))
    if not counts:
        return f"{report.dtype} activations{cache}"
    vocabulary = {names.EMBED_TOKENS} if report.spec.tie_word_embeddings else {names.EMBED_TOKENS, names.LM_HEAD}
    exits = {name for head in report.exits for name in _own_matrices(head, report.spec)}
    if report.drafter is not None:
        exits |= drafter_matrices(report.drafter.spec, report.spec.hidden_size, report.spec.vocab_size).keys()
    layers = {
        names.layer_weight(layer, part)
        for layer in range(report.spec.num_hidden_layers)
        for part in matrix_parts(report.spec.weights(layer))
    }
    if floats := len((vocabulary | exits | layers) - precision.weights.keys()):
        counts[report.dtype] = floats
    (most, count), *others = counts.most_common()
    words = [f"{count} {'matrix' if count == 1 else 'matrices'} {most}", *(f"{n} {kind}" for kind, n in others)]
    return f"{report.dtype} activations{cache}; {'; '.join(words)}"


def _own_matrices(head: HeadReport, spec: ModelSpec) -> set[str]:
    """Return the names of an exit's own matrices, rows of the LM head that it shares included."""
    assert head.exit_spec is not None
    parts = set(exit_matrices(spec, head.exit_spec))
    if head.owns_weights and head.exit_spec.head != "low_rank":
        parts.add("head.weight")
    return {names.exit_weight(head.exit_layer, part) for part in parts}


def facts(report: Report) -> list[tuple[str, str]]:
    """Return the header: label and value of each fact about the bundle as a whole."""
    tools = ", ".join(f"{printable(name)} {printable(version)}" for name, version in report.tools.items())
    per_token = report.cache_bytes_per_token
    hashes = "every file matches" if report.verified else "not checked (--verify does)"
    return [
        ("model", model_words(report)),
        ("precision", precision_words(report)),
        *origin_facts(report),
        *drafter_facts(report),
        ("max length", f"{report.max_length:,} tokens"),
        ("cache", f"{size(per_token)} per token, {size(per_token * report.max_length)} at max length"),
        *attention_facts(report),
        ("source", f"{printable(report.source_name)} (sha256 {short_hash(report.source_sha256)})"),
        ("written by", f"{tools or 'unknown'}; format {report.format_version}"),
        ("hashes", hashes),
        ("on disk", f"{size(report.total_bytes)} in {len(report.files)} files"),
    ]


_DRAFTERS = {
    "eagle3": "EAGLE-3 head",
    "eagle": "EAGLE head",
    "mtp": "layer for multi-token prediction",
    "assistant": "assistant",
}


def drafter_facts(report: Report) -> list[tuple[str, str]]:
    """Return what drafts beside the model, if something does."""
    found = report.drafter
    if found is None:
        return []
    spec, layers = found.spec, len(found.spec.layers)
    depths = ", ".join(map(str, spec.features))
    reads = f"the residual stream after {depths} layers" if depths else "the normalised final state"
    rows = f"{found.rows:,} of {report.spec.vocab_size:,} tokens" if spec.has_head_ids else "all tokens"
    cache = f"{size(found.cache_bytes_per_token)} per token"
    if spec.shared:
        owners = ", ".join(map(str, sorted(set(spec.shared))))
        reads, cache = f"{reads} and the keys and values of layers {owners}", "no cache of its own"
    words = [
        f"{layers} layers for multi-token prediction, one for each draft" if spec.stages > 1 else _DRAFTERS[spec.kind],
        f"{layers} layer{'s' * (layers != 1)}, hidden {spec.hidden_size}, {found.stored_as}",
        f"reads {reads}",
        f"drafts {rows}",
        size(found.weight_bytes),
        cache,
        f"f {found.draft_cost:.3f}, predicted from weight bytes read",
    ]
    return [("drafter", " · ".join(words))]


def origin_facts(report: Report) -> list[tuple[str, str]]:
    """Return what became of the checkpoint's blocks, if any were kept."""
    groups = grouped(report.origins, report.precision.weights)
    return [("blocks kept", "; ".join(printable(group.words) for group in groups))] if groups else []


def attention_facts(report: Report) -> list[tuple[str, str]]:
    """Return label and value of what few models have: layers that run in passes, windows, masked diagonals."""
    found: list[tuple[str, str]] = []
    if report.iterated_groups:
        groups = group_words(report.iterated_groups)
        found.append(("passes", f"{groups} run in passes over a prompt, in one over a single token"))
    by_window: dict[int, list[int]] = {}
    for layer in report.layers:
        by_window.setdefault(layer.window, []).append(layer.layer)
    full = by_window.pop(0, [])
    if by_window:
        words = [f"the last {window:,} positions in {layers_of(seen)}" for window, seen in by_window.items()]
        words += [f"all positions in {layers_of(full)}"] if full else []
        found.append(("windows", "; ".join(words)))
    blind = [layer.layer for layer in report.layers if not layer.sees_itself]
    if blind:
        own = "its" if len(blind) == 1 else "their"
        found.append(("diagonal", f"masked: {layers_of(blind)} cannot see {own} own position"))
    return found


def group_words(groups: Sequence[IteratedGroup]) -> str:
    """Return iterated groups, neighbours kept apart: ``layers 0..2, 3..5``."""
    return f"layers {', '.join(ranges(range(group.start, group.end)) for group in groups)}"


@dataclass(frozen=True, slots=True)
class KVLine:
    """Owners of K,V in one segment that nobody else uses, or one owner with its consumers.

    Attributes:
        owners: Layers; none for the block of an exit.
        segment: Index of their segment.
        consumers: Other layers that use their K,V.
        block: The block of an exit, in words; empty for layers.
    """

    owners: tuple[int, ...]
    segment: int
    consumers: tuple[int, ...]
    block: str = ""

    @property
    def words(self) -> str:
        """The owners in words."""
        return self.block or ranges(self.owners)


def kv_lines(report: Report) -> list[KVLine]:
    """Return who owns K,V and who uses it, bottom to top, owners without consumers gathered."""
    lines: list[KVLine] = []
    for layer in report.layers:
        if not layer.owns_kv:
            continue
        last = lines[-1] if lines else None
        if last and not last.consumers and not layer.consumers and last.segment == layer.segment:
            lines[-1] = KVLine((*last.owners, layer.layer), layer.segment, ())
        else:
            lines.append(KVLine((layer.layer,), layer.segment, layer.consumers))
    blocks = [KVLine((), s.index, (), block_words(s.head)) for s in report.segments if s.head.kv_owner is not None]
    return sorted((*lines, *blocks), key=lambda line: line.segment)


def block_words(head: HeadReport) -> str:
    """Return what an exit's block is called among the owners of K,V; empty without one."""
    return "" if head.kv_owner is None else f"exit {head.exit_layer}'s layer"


def kv_owned_words(segment: SegmentReport) -> str:
    """Return who owns K,V in a segment: ``0..7, exit 8's layer``."""
    owners = [ranges(segment.kv_owned)] if segment.kv_owned or segment.head.kv_owner is None else []
    return ", ".join((*owners, *filter(None, [block_words(segment.head)])))


def precision_note(report: Report) -> str | None:
    """Return a warning when weights.data is not what its precision says, so that predictions by bytes are off."""
    weights = report.weights
    if weights.as_predicted:
        return None
    return (
        f"{names.WEIGHTS_FILE} holds {size(weights.stored)} where the precision in {names.MANIFEST_FILE} makes "
        f"{size(weights.predicted)}: predicted draft costs may be off"
    )


@dataclass(frozen=True, slots=True)
class PortLine:
    """One port, or a run of cache ports of the same kind and shape."""

    name: str
    dtype: str
    shape: str


def port_lines(ports: Sequence[Port]) -> list[PortLine]:
    """Return the ports in order, cache ports of all layers in one line: ``present.{0..7}.key/value``."""
    lines: dict[tuple[str, str, str], tuple[list[int], list[str]]] = {}
    for port in ports:
        shape = f"[{', '.join(str(d) for d in port.shape)}]"
        match = _CACHE_PORT.fullmatch(port.name)
        layers, parts = lines.setdefault((match[1] if match else port.name, port.dtype, shape), ([], []))
        if match:
            layers += [] if int(match[2]) in layers else [int(match[2])]
            parts += [] if match[3] in parts else [match[3]]
    return [
        PortLine(f"{name}{_braced(layers)}.{'/'.join(parts)}" if layers else name, dtype, shape)
        for (name, dtype, shape), (layers, parts) in lines.items()
    ]


def _braced(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else "{" + ranges(layers).replace(" ", "") + "}"
