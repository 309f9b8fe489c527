"""The stack as a picture: where each bar, line and label of `shortstack inspect --html` is drawn. Knows no SVG.

::

            token, logits
            ┌───────────┐
            │ LM head   │                    column   area follows bytes, but for blocks with a zigzag, cut short
            ├───────────┤
     ┌────> │ layer 3   │ ┐
     │┌───> │ layer 2   │ ┘ segment 1             an arrow down next to layers: they run in passes
     │      ├ ─ hidden ─┼──────> exit 2      right    exits; width of a head follows its rows
     │└── ▪ │ layer 1   │ ┐
     └─── ▪ │ layer 0   │ ┘ segment 0
            │ embedding │
            └───────────┘
    left: who uses whose K,V

Units are those of the view box, y grows downwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shortstack.graphs.kv_map import IteratedGroup
from shortstack.runtime.inspection.report import HeadReport, LayerReport, Report, SegmentReport
from shortstack.runtime.inspection.sizes import BYTES_PER_VALUE
from shortstack.runtime.inspection.words import branch_words, group_words, layers, quantity, ranges, size

SEGMENT_COLOURS = 6

_WIDTH = 480.0
_COLUMN_X, _COLUMN_WIDTH = 70.0, 160.0
_COLUMN_RIGHT = _COLUMN_X + _COLUMN_WIDTH
_MIDDLE = _COLUMN_X + _COLUMN_WIDTH / 2
_LOOP_X = _COLUMN_RIGHT + 19
_BRACKET_X = _COLUMN_RIGHT + 31
_RIGHT_X, _RIGHT_WIDTH = 274.0, 200.0
_MARK_X, _WINDOW_WIDTH = _COLUMN_X + 7, 84.0
_CACHE_X, _CACHE_SIZE = _COLUMN_X - 14, 9.0
_LANE_RIGHT, _LANE_SPACE, _LANE_PITCH = 48.0, 42.0, 8.0

_STACK_HEIGHT = 440.0  # what the layers share, before limits
_TALLEST_STACK = 680.0  # up to this, layers grow to make room for labels; beyond, the cuts do
_LAYER_HEIGHTS = (8.0, 24.0)
_TEXT_HEIGHT = 34.0  # two lines that name the embedding or the LM head
_TABLE_HEIGHTS = (2.0, 130.0)  # of these two
_CUT_HEIGHT = 36.0
_NODE_HEIGHT, _LABEL_HEIGHT = 60.0, 38.0  # text in the right lane that must not overlap
_PASSES_HEIGHT = 14.0  # one more line of it
_GROUPS_LENGTH = 23  # characters that fit next to the column with "run in passes"
_PART_WORDS = {"qkv": "qkv", "o": "o", "mlp": "MLP and norms"}
_END_HEIGHT = 44.0  # arrow and words above and below the column


@dataclass(frozen=True, slots=True)
class Rect:
    """A block; ``title`` is shown on hover."""

    x: float
    y: float
    width: float
    height: float
    css: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A path that is stroked, not filled."""

    d: str
    css: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """A line of text; ``y`` is its baseline."""

    x: float
    y: float
    text: str
    css: str = ""


@dataclass(slots=True)
class Picture:
    """What to draw, in this order: lines, rects, marks on them, labels."""

    width: float
    height: float = 0.0
    lines: list[Line] = field(default_factory=list)
    rects: list[Rect] = field(default_factory=list)
    marks: list[Line] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


def draw_stack(report: Report) -> Picture:
    """Lay out a report's stack, top to bottom."""
    picture = Picture(_WIDTH)
    pitch = _layer_pitch(report)
    widest = max(layer.weight_bytes for layer in report.layers)
    bytes_per_unit = widest / (pitch - _gap(pitch))  # of height, at full column width
    middles: dict[int, float] = {}  # layer -> y of its middle

    picture.labels.append(Label(_MIDDLE, 14, "token, confidence, logits", "middle muted"))
    y = _final_head(picture, report, _END_HEIGHT, bytes_per_unit)
    for segment in reversed(report.segments):
        top = y
        for layer in reversed(report.layers[segment.start : segment.end]):
            middles[layer.layer] = _layer(picture, layer, y, pitch, report)
            y += pitch
        _bracket(picture, report, segment, top, y)
        if segment.index:
            below = report.segments[segment.index - 1]
            height = _cut_height(report, segment, below, pitch)
            _exit(picture, report, below.head, y + height / 2)
            _arrow_up(picture, y, y + height)
            y += height
    y = _embedding(picture, report, y + 4, bytes_per_unit)
    picture.labels.append(Label(_MIDDLE, y + 14, "input_ids", "middle muted"))
    picture.height = y + 24
    _shared_kv(picture, report, middles)
    for group in report.iterated_groups:
        _loop(picture, group, middles)
    return picture


def segment_css(index: int) -> str:
    """Return the colour class of a segment."""
    return f"seg{index % SEGMENT_COLOURS}"


def _layer_pitch(report: Report) -> float:
    """Return a height for layers that fills the page and leaves each segment room for its label."""
    low, high = _LAYER_HEIGHTS
    fewest = min(segment.end - segment.start for segment in report.segments)
    room = _label_height(report) + (_NODE_HEIGHT - _CUT_HEIGHT if report.exits else 0)
    count = len(report.layers)
    return min(high, max(low, _STACK_HEIGHT / count, min(room / fewest, _TALLEST_STACK / count)))


def _gap(pitch: float) -> float:
    """Return the space between two layers."""
    return 1.0 if pitch < 10 else 2.0


def _label_height(report: Report) -> float:
    return _LABEL_HEIGHT + (_PASSES_HEIGHT if report.iterated_groups else 0)


def _cut_height(report: Report, above: SegmentReport, below: SegmentReport, pitch: float) -> float:
    fewest = min(above.end - above.start, below.end - below.start)
    return max(_CUT_HEIGHT, _NODE_HEIGHT + _label_height(report) - fewest * pitch)


def _arrow_up(picture: Picture, top: float, bottom: float) -> float:
    d = f"M{_MIDDLE:g},{bottom - 1:g} V{top + 3:g} m-4,5 l4,-5 l4,5"
    picture.lines.append(Line(d, "flow", "the residual stream"))
    return bottom


def _table_height(table_bytes: int, bytes_per_unit: float) -> float:
    low, high = _TABLE_HEIGHTS
    return min(high, max(low, table_bytes / bytes_per_unit))


def _table(
    picture: Picture, y: float, label_y: float, table_bytes: int, bytes_per_unit: float, css: str, title: str,
    words: tuple[str, str],
) -> None:  # fmt: skip
    """Draw a block of vocab rows to scale; one too high for the page is cut short and gets a zigzag."""
    natural, height = table_bytes / bytes_per_unit, _table_height(table_bytes, bytes_per_unit)
    first, second = words
    is_cut_short = natural > height
    note = f"\ncut short: to scale it is {natural / height:.2g} times this height" if is_cut_short else ""
    picture.rects.append(Rect(_COLUMN_X, y, _COLUMN_WIDTH, height, css, title + note))
    if is_cut_short:
        zigzag = " ".join(f"l8,{-5 if i % 2 else 5}" for i in range(int(_COLUMN_WIDTH / 8)))
        picture.marks.append(Line(f"M{_COLUMN_X:g},{y + height * 0.78:g} {zigzag}", "break"))
    fits = height >= _TEXT_HEIGHT
    x, place = (_MIDDLE, "middle on-table") if fits else (_COLUMN_RIGHT + 10, "")
    picture.labels.append(Label(x, label_y - 3, first, place))
    picture.labels.append(Label(x, label_y + 11, second, f"{place} small" if fits else "muted small"))


def _final_head(picture: Picture, report: Report, y: float, bytes_per_unit: float) -> float:
    spec, head = report.spec, report.segments[-1].head
    tied = spec.tie_word_embeddings
    stored = "the embedding again: stored once" if tied else size(report.weights.lm_head)
    reads = f"{head.rows:,} rows of {spec.hidden_size}, {head.stored_as}, reads {size(head.weight_bytes)}"
    height = _table_height(head.weight_bytes, bytes_per_unit)
    room = max(height, _TEXT_HEIGHT)
    top = y + room - height
    _arrow_up(picture, 20, top)
    _table(
        picture, top, y + room / 2, head.weight_bytes, bytes_per_unit, "table tied" if tied else "table",
        f"final norm and LM head\n{reads}\n{stored}",
        (f"LM head · {head.rows:,} rows", "tied, stored once" if tied else size(head.weight_bytes)),
    )  # fmt: skip
    return y + room + 4


def _embedding(picture: Picture, report: Report, y: float, bytes_per_unit: float) -> float:
    spec, stored = report.spec, report.weights.embedding
    height = _table_height(stored, bytes_per_unit)
    room = max(height, _TEXT_HEIGHT)
    _table(
        picture, y, y + room / 2, stored, bytes_per_unit, "table",
        f"token embedding\n{spec.vocab_size:,} rows of {spec.hidden_size}, {size(stored)}",
        (f"embedding · {spec.vocab_size:,} rows", size(stored)),
    )  # fmt: skip
    return _arrow_up(picture, y + height, y + room + _END_HEIGHT - 20)


def _layer(picture: Picture, layer: LayerReport, y: float, pitch: float, report: Report) -> float:
    """Draw one layer, each part as wide as its bytes are many, and return the y of its middle."""
    gap = _gap(pitch)
    height, middle = pitch - gap, y + pitch / 2
    widest = max(other.weight_bytes for other in report.layers)
    width = _COLUMN_WIDTH * layer.weight_bytes / widest
    p = layer.parameters
    kv = f"owns its K,V; used by layers {ranges(layer.consumers)}" if layer.consumers else "owns its K,V"
    kv = kv if layer.owns_kv else f"uses the K,V of layer {layer.kv_layer}"
    title = (
        f"layer {layer.layer}: {quantity(p.total)} parameters, {size(layer.weight_bytes)}\n"
        f"qkv {quantity(p.qkv)} · o {quantity(p.o)} · mlp {quantity(p.mlp)} · norms {quantity(p.norms)}"
        f"{f' · biases {quantity(p.biases)}' if p.biases else ''}\n{kv}"
    )
    title += f"\nsees the last {layer.window:,} positions" if layer.window else ""
    title += "" if layer.sees_itself else "\ncannot see its own position"
    taken = layer.part_bytes
    x, parts = _COLUMN_X, {"qkv": taken.qkv, "o": taken.o, "mlp": taken.mlp + taken.norms}
    for part, count in parts.items():
        share = width * count / layer.weight_bytes
        here = f"{title}\nhere: {_PART_WORDS[part]}, {size(count)}"
        picture.rects.append(Rect(x, y + gap / 2, share, height, f"{segment_css(layer.segment)} {part}", here))
        x += share
    if layer.owns_kv:
        side = min(_CACHE_SIZE, height)
        of_layers = report.cache_bytes_per_token - sum(head.cache_bytes_per_token for head in report.exits)
        cache_bytes = of_layers // sum(other.owns_kv for other in report.layers)
        cache_title = f"K,V cache of layer {layer.layer}: {size(cache_bytes)} per token\n{kv}"
        picture.rects.append(Rect(_CACHE_X, middle - side / 2, _CACHE_SIZE, side, "kv", cache_title))
    narrowest = _COLUMN_WIDTH * min(other.weight_bytes for other in report.layers) / widest
    _sight(picture, layer, middle, height, _COLUMN_X + max(narrowest - 6, _WINDOW_WIDTH))
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * pitch >= 11)
    if layer.layer % step == 0:
        picture.labels.append(Label(_COLUMN_RIGHT + 5, middle + 3.5, str(layer.layer), "number"))
    return middle


def _sight(picture: Picture, layer: LayerReport, y: float, height: float, right: float) -> None:
    """Mark on a layer what it does not see: a crossed circle for its own position, words for a window, up to right."""
    if not layer.sees_itself:
        r = min(4.0, height / 2 - 0.5)
        circle = f"M{_MARK_X - r:g},{y:g} a{r:g},{r:g} 0 1 0 {2 * r:g},0 a{r:g},{r:g} 0 1 0 {-2 * r:g},0"
        slash = f"M{_MARK_X - 0.7 * r:g},{y + 0.7 * r:g} l{1.4 * r:g},{-1.4 * r:g}"
        picture.marks.append(Line(f"{circle} {slash}", "diagonal", f"layer {layer.layer} cannot see its own position"))
    if layer.window:
        css = "end mark" if height > 9 else "end mark tiny"
        picture.labels.append(Label(right, y + 3, f"window {layer.window:,}", css))


def _loop(picture: Picture, group: IteratedGroup, middles: dict[int, float]) -> None:
    """Draw an arrow from the top of an iterated group back to its bottom."""
    top, bottom = middles[group.end - 1], middles[group.start]
    d = f"M{_LOOP_X:g},{top:g} h6 V{bottom:g} h-6 m3.5,-3 l-3.5,3 l3.5,3"
    picture.lines.append(Line(d, "loop", f"{group_words((group,))} run in passes over a prompt"))


def _bracket(picture: Picture, report: Report, segment: SegmentReport, top: float, bottom: float) -> None:
    css, middle = segment_css(segment.index), (top + bottom) / 2
    title = f"{segment.file}: {layers(segment.start, segment.end)}, graph {size(segment.graph_bytes)}"
    picture.lines.append(Line(f"M{_BRACKET_X - 3:g},{top + 1:g} h5 V{bottom - 1:g} h-5", f"bracket {css}", title))
    count = segment.end - segment.start
    words = f"{count} layer{'s' * (count != 1)} · {segment.parameter_share:.1%} of parameters"
    groups = [group for group in report.iterated_groups if segment.start <= group.start < segment.end]
    y = middle - 2 - (_PASSES_HEIGHT / 2 if groups else 0)
    picture.labels.append(Label(_RIGHT_X, y, segment.file, f"strong {css}"))
    picture.labels.append(Label(_RIGHT_X, y + 15, words, "muted small"))
    if groups:
        which = group_words(groups) if len(group_words(groups)) <= _GROUPS_LENGTH else f"{len(groups)} groups of layers"
        picture.labels.append(Label(_RIGHT_X, y + 15 + _PASSES_HEIGHT, f"{which} run in passes", "small"))


def _exit(picture: Picture, report: Report, head: HeadReport, y: float) -> None:
    """Draw the cut and the exit that branches off there; a full head would fill the outline."""
    spec = report.spec
    per_token = size(spec.hidden_size * BYTES_PER_VALUE[report.dtype])
    hidden = f"hidden states [batch, seq, {spec.hidden_size}] cross the cut: {per_token} per token"
    picture.lines.append(Line(f"M2,{y:g} H{_MIDDLE:g}", "cut", hidden))
    picture.lines.append(Line(f"M{_MIDDLE:g},{y:g} H{_RIGHT_X - 4:g} m-5,-4 l5,4 l-5,4", "flow", hidden))
    picture.labels.append(Label(_MIDDLE - 10, y - 5, f"hidden · {per_token}", "end muted small"))
    trimmed = head.rows < spec.vocab_size
    rows = f"{head.rows:,} of {spec.vocab_size:,} rows" if trimmed else f"all {head.rows:,} rows"
    stored = f", {head.stored_as}" + ("" if head.owns_weights else ", the final head's own weights")
    complete = " · KV-complete" if head.kv_complete else ""
    title = (
        f"exit after {head.exit_layer} layers{complete}\n"
        f"{branch_words(head)}norm and LM head, {rows}{stored}: {size(head.weight_bytes)}\n"
        f"predicted draft cost {head.draft_cost:.3f} of a plain step"
    )
    width = max(3.0, _RIGHT_WIDTH * head.rows / spec.vocab_size)
    picture.rects.append(Rect(_RIGHT_X, y - 7, _RIGHT_WIDTH, 14, "outline", title))
    picture.rects.append(Rect(_RIGHT_X, y - 7, width, 14, "table exit", title))
    picture.labels.append(Label(_RIGHT_X, y - 13, f"exit after {head.exit_layer}{complete}", "strong"))
    picture.labels.append(Label(_RIGHT_X, y + 21, f"{rows} · f ≈ {head.draft_cost:.2f}", "muted small"))


def _shared_kv(picture: Picture, report: Report, middles: dict[int, float]) -> None:
    """Draw a line from each shared cache to its consumers, in lanes so that no two run on top of each other."""
    owners = [layer for layer in report.layers if layer.consumers]
    lanes: list[int] = []  # the highest layer that each lane is taken up to
    lane_of: dict[int, int] = {}
    for owner in sorted(owners, key=lambda layer: min(layer.layer, *layer.consumers)):
        low, high = min(owner.layer, *owner.consumers), max(owner.layer, *owner.consumers)
        lane = next((i for i, taken in enumerate(lanes) if taken < low), len(lanes))
        lanes[lane : lane + 1] = [high]
        lane_of[owner.layer] = lane
    pitch = min(_LANE_PITCH, _LANE_SPACE / max(1, len(lanes) - 1))
    for owner in owners:
        x, start = _LANE_RIGHT - lane_of[owner.layer] * pitch, middles[owner.layer]
        reached = [middles[i] for i in owner.consumers]
        ends = [y for y in (min(reached), max(reached)) if (y < start) == (y == min(reached))] or [reached[0]]
        d = " ".join(f"M{_CACHE_X:g},{start:g} H{x:g} V{y:g}" for y in ends)
        d += "".join(f" M{x:g},{y:g} H{_COLUMN_X - 2:g} m-4,-2.5 l4,2.5 l-4,2.5" for y in reached)
        title = f"layers {ranges(owner.consumers)} use the K,V of layer {owner.layer}"
        picture.lines.append(Line(d, "share", title))
