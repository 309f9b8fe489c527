"""What a frozen model computes over its answers, kept on disk: inputs and targets of every exit that is trained.

One forward pass fills flat arrays over all tokens of all rows; exits are then trained without the model::

    meta.json        what was run on what; which batches are done
    tokens.npy       int32 [tokens]          the text
    targets.npy      int32 [tokens]          what the whole model would predict next
    state.npy        float16 [tokens, hidden]  the residual stream after all layers, divided by its root mean square
    hidden-02.npy    float16 [tokens, hidden]  the residual stream after 2 layers
    middle-02.npy    the one between attention and MLP of the last of these layers, if an exit reads it

The stream after 30 layers of a trained model reaches past what float16 holds only in attention sinks; such values are
clamped, since every reader divides by the root mean square anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec_json import spec_to_json
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.recipes.training.precision import autocast, is_bf16_fast

SAVE_EVERY = 8  # batches
_META = "meta.json"
_F16_MAX = float(np.finfo(np.float16).max)
_HEAD_ROWS = 1024  # positions whose logits are held at once
_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class Features:
    """Cached activations of one model over some rows; arrays are memory-mapped.

    Attributes:
        starts: First token of each row, and the number of tokens at the end; int64 [rows + 1].
        answer_starts: First token of each row's answer, int64 [rows].
        is_held_out: bool [rows].
        tokens: int32 [tokens].
        targets: int32 [tokens], the whole model's next token.
        state: float16 [tokens, hidden].
        hidden: By depth, float16 [tokens, hidden].
        middle: By depth, float16 [tokens, hidden]; only where asked for.
    """

    starts: npt.NDArray[np.int64]
    answer_starts: npt.NDArray[np.int64]
    is_held_out: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    state: npt.NDArray[np.float16]
    hidden: dict[int, npt.NDArray[np.float16]]
    middle: dict[int, npt.NDArray[np.float16]]

    def row_positions(self, row: int) -> range:
        """Return the positions of a row's answer: where an exit would draft."""
        return range(int(self.answer_starts[row]), int(self.starts[row + 1]))


def extract_features(
    twin: Twin,
    rows: Sequence[Example],
    is_held_out: Sequence[bool],
    folder: Path,
    depths: Sequence[int],
    *,
    middles: Sequence[int] = (),
    batch_tokens: int = 4096,
    use_bf16: bool | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Features:
    """Run the model over the rows, or what is left of it, and open the arrays.

    Args:
        twin: The model, frozen.
        rows: What to run it on.
        is_held_out: Which of them are for evaluation only.
        folder: Where the arrays are kept; a run that was stopped continues there.
        depths: Where exits will be; a folder that holds more serves too.
        middles: Depths whose exits read the stream between attention and MLP.
        batch_tokens: Positions run at once, padding included.
        use_bf16: Multiply in bfloat16 in the layers; None does where that is faster.
        advance: Told the number of tokens done.

    Raises:
        RequestError: The folder holds the features of something else.
    """
    use_bf16 = is_bf16_fast("cpu") if use_bf16 is None else use_bf16
    starts = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64)
    total, width = int(starts[-1]), twin.spec.hidden_size
    tokens = np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in rows])
    identity: dict[str, Any] = {
        "model": model_digest(twin),
        "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "batch_tokens": batch_tokens,
        "use_bf16": use_bf16,
        "depths": sorted(depths),
        "middles": sorted(middles),
    }
    stored = _stored(folder, identity)
    done = 0 if stored is None else int(stored["done_batches"])
    identity = identity if stored is None else {key: stored[key] for key in identity}  # perhaps of more depths
    kept, kept_middles = identity["depths"], identity["middles"]
    shapes = {"targets": ((total,), np.int32), "state": ((total, width), np.float16)}
    shapes |= {_hidden_name(depth): ((total, width), np.float16) for depth in kept}
    shapes |= {_middle_name(depth): ((total, width), np.float16) for depth in kept_middles}
    folder.mkdir(parents=True, exist_ok=True)
    mode = "r+" if done else "w+"
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode=mode, dtype=dtype, shape=None if done else shape)
        for name, (shape, dtype) in shapes.items()
    }
    top = twin.spec.num_hidden_layers
    for number, batch in enumerate(batches([len(row.ids) for row in rows], batch_tokens)):
        if number >= done:
            found = run_batch(twin, [rows[row].ids for row in batch], (*kept, top), kept_middles, use_bf16)
            for place, row in enumerate(batch):
                span = slice(int(starts[row]), int(starts[row + 1]))
                for name, value in found[place].items():
                    arrays[name][span] = value
            if number % SAVE_EVERY == SAVE_EVERY - 1:
                _save_done(folder, identity, number + 1, arrays)
        advance(float(sum(len(rows[row].ids) for row in batch)))
    if number >= done:
        _save_done(folder, identity, number + 1, arrays)
    return Features(
        starts=starts,
        answer_starts=starts[:-1] + np.array([row.start for row in rows]),
        is_held_out=np.array(is_held_out),
        tokens=tokens,
        targets=arrays["targets"],
        state=arrays["state"],
        hidden={depth: arrays[_hidden_name(depth)] for depth in depths},
        middle={depth: arrays[_middle_name(depth)] for depth in middles},
    )


@torch.no_grad()
def run_batch(
    twin: Twin, sequences: Sequence[Sequence[int]], depths: Sequence[int], middles: Sequence[int], use_bf16: bool
) -> list[dict[str, npt.NDArray[np.generic]]]:
    """Return the arrays of each sequence, the most likely tokens as float32 finds them."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for place, sequence in enumerate(sequences):
        ids[place, : len(sequence)] = torch.tensor(sequence)
    with autocast("cpu", use_bf16):
        found = twin.eval().boundaries(ids, set(depths))
    top = found[twin.spec.num_hidden_layers].hidden.float()
    results = []
    for place, sequence in enumerate(sequences):
        last = top[place, : len(sequence)]
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "targets": _next_tokens(twin, last, use_bf16),
            "state": _half(unit_rms(last, twin.spec.norm_eps)),
        }
        for depth in depths:
            if depth != twin.spec.num_hidden_layers:
                arrays[_hidden_name(depth)] = _half(found[depth].hidden[place, : len(sequence)])
        for depth in middles:
            arrays[_middle_name(depth)] = _half(found[depth].middle[place, : len(sequence)])
        results.append(arrays)
    return results


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield row numbers in groups of similar length, each of at most ``batch_tokens`` positions with padding."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def model_digest(twin: Twin) -> str:
    """Return a hash that tells models apart: their spec, and a few of their weights."""
    digest = hashlib.sha256(json.dumps(spec_to_json(twin.spec), sort_keys=True).encode())
    for name, tensor in twin.state_dict().items():
        digest.update(name.encode() + tensor.detach().flatten()[:256].float().numpy().tobytes())
    return digest.hexdigest()


def _next_tokens(twin: Twin, last: Tensor, use_bf16: bool) -> npt.NDArray[np.int32]:
    """Return the most likely token after each position, int32 [positions].

    bfloat16 is twice as fast but makes near ties equal: it only proposes, and float32 decides.
    """
    found = []
    for part in torch.split(last, _HEAD_ROWS):
        state = twin.state(part)  # [positions, hidden]
        if not use_bf16:
            found.append(functional.linear(state, twin.head_weight).argmax(-1))
            continue
        rough = functional.linear(state.bfloat16(), twin.head_weight.bfloat16()).float()
        likely = rough.topk(min(_CANDIDATES, rough.shape[-1]), sorted=False).indices  # [positions, candidates]
        exact = torch.einsum("ph,pch->pc", state, twin.head_weight[likely])
        found.append(likely.gather(-1, exact.argmax(-1, keepdim=True)).squeeze(-1))
    return torch.cat(found).numpy().astype(np.int32)


def _half(x: Tensor) -> npt.NDArray[np.float16]:
    return x.float().clamp(-_F16_MAX, _F16_MAX).numpy().astype(np.float16)


def _hidden_name(depth: int) -> str:
    return f"hidden-{depth:02d}"


def _middle_name(depth: int) -> str:
    return f"middle-{depth:02d}"


def _stored(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / _META
    if not path.exists():
        return None
    meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(key for key, value in wanted.items() if not _is_there(meta.get(key), value))
    if different:
        raise RequestError(
            f"{folder} holds the features of something else: {', '.join(different)} differ",
            remedy="remove that folder, or choose another",
        )
    return meta


def _is_there(stored: object, wanted: object) -> bool:
    """Whether what was asked for is stored, be it among more depths."""
    if isinstance(stored, list) and isinstance(wanted, list):
        return set(wanted) <= set(stored)
    return stored == wanted


def _save_done(
    folder: Path,
    identity: dict[str, object],
    done: int,
    arrays: dict[str, np.memmap[tuple[int, ...], np.dtype[np.generic]]],
) -> None:
    for array in arrays.values():
        array.flush()
    partial = folder / f"{_META}.partial"
    partial.write_text(json.dumps({**identity, "done_batches": done}), encoding="utf-8")
    partial.replace(folder / _META)
