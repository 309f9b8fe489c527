"""Measures a quantized bundle against its source: both run in the runtime, on text that calibration did not see."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import ShortstackError
from shortstack.progress import Stage
from shortstack.quant.quality import Quality, Side
from shortstack.quant.quality_texts import continue_prompts, forks, report_slots, texts_per_prompt
from shortstack.quant.record import QuantizationRecord
from shortstack.quant.spec import ReportSpec
from shortstack.quant.texts import ReportTexts
from shortstack.runtime.engine.draft_vocab import read_draft_vocab
from shortstack.runtime.engine.whole_text import Activations
from shortstack.runtime.model import Model

Floats = npt.NDArray[np.float32]
WORST = 5
_MEMORY_TOKENS = 16


@dataclass(slots=True)
class _Tally:
    """Sums over held-out positions; pairs are source and result.

    Attributes:
        draft_ids: By depth, the token ids of a trimmed head's rows.
        nll: Negative log likelihood of the text, nats.
        kl: KL divergence at each position, by row of text.
        same_top: Positions with the same most likely token.
        predicted: Tokens that ``nll`` is the sum of.
        positions: Positions that the rest is counted over.
        agreements: By depth, positions where the exit predicts what the final head does.
    """

    draft_ids: tuple[dict[int, npt.NDArray[np.int64] | None], ...]
    nll: list[float] = field(default_factory=lambda: [0.0, 0.0])
    kl: list[Floats] = field(default_factory=list)
    same_top: int = 0
    predicted: int = 0
    positions: int = 0
    agreements: list[dict[int, int]] = field(default_factory=lambda: [{}, {}])

    def add(self, tokens: npt.NDArray[np.int64], activations: tuple[Activations, Activations]) -> None:
        """Count one row of text [seq]; ``activations`` are those of source and result."""
        depth = max(activations[0].heads)
        logp = [_log_softmax(t.heads[depth]) for t in activations]
        tops = [x.argmax(axis=1) for x in logp]
        following, at = tokens[1:], np.arange(len(tokens) - 1)
        for side in (0, 1):
            self.nll[side] -= float(logp[side][at, following].sum(dtype=np.float64))
            for exit_layer, logits in activations[side].heads.items():
                if exit_layer == depth:
                    continue
                best = logits.argmax(axis=1)
                ids = self.draft_ids[side][exit_layer]
                hits = int(((best if ids is None else ids[best]) == tops[side]).sum())
                self.agreements[side][exit_layer] = self.agreements[side].get(exit_layer, 0) + hits
        self.predicted += len(following)
        self.positions += len(tokens)
        self.same_top += int((tops[0] == tops[1]).sum())
        # KL(p || q) = sum p (log p - log q), over the vocabulary
        self.kl.append((np.exp(logp[0]) * (logp[0] - logp[1])).sum(axis=1))

    def perplexity(self, side: int) -> float:
        """Return exp of the mean negative log likelihood."""
        return float(np.exp(self.nll[side] / self.predicted))


def judge(
    source: Bundle,
    result: Bundle,
    texts: ReportTexts,
    request: ReportSpec,
    record: QuantizationRecord | None,
    stage: Stage,
) -> Quality:
    """Compare a quantized bundle with its source.

    Args:
        source: The bundle before.
        result: The bundle after.
        texts: What to compare on.
        request: What was asked for.
        record: How the bundle was quantized; None where that is not known.
        stage: Starts a stage of the progress bar.
    """
    rows = texts.heldout
    advance = stage("Measuring memory", 2)
    memory = []
    for bundle in (source, result):
        memory.append(_peak_rss_bytes(bundle))
        advance(1)
    advance = stage("Comparing on held-out text", len(rows))
    tally = _Tally(tuple(_draft_ids(bundle) for bundle in (source, result)))
    with Model(source) as before, Model(result) as after:
        for row in rows:
            tally.add(row, (before.activations(row.tolist()), after.activations(row.tolist())))
            advance(1)
    pair = (source, result)
    advance = stage("Continuing prompts", len(texts.prompts) * sum(map(texts_per_prompt, pair)))
    slots, count = report_slots(pair), request.continuation_tokens
    continued = [continue_prompts(bundle, texts.prompts, count, slots, advance) for bundle in pair]
    precision, formats = result.manifest.precision, dict[str, int]()
    for block_format in precision.weights.values():
        formats[str(block_format)] = formats.get(str(block_format), 0) + 1
    if precision.kv_cache != "float":
        formats[f"{precision.kv_cache} KV cache"] = len(set(source.manifest.spec.kv_map))
    kl = np.concatenate(tally.kl)
    sides = [
        Side(
            weights_sha256=bundle.manifest.weights_sha256,
            disk_bytes=sum(e.bytes for name, e in bundle.manifest.files.items() if name != names.QUALITY_FILE),
            peak_rss_bytes=memory[side],
            perplexity=tally.perplexity(side),
            exit_agreement={e: n / tally.positions for e, n in tally.agreements[side].items()},
            acceptance=continued[side].acceptance,
        )
        for side, bundle in enumerate((source, result))
    ]
    return Quality(
        preset=None if record is None else record.preset,
        method=None if record is None else record.method,
        formats=formats,
        calibration=None if record is None else record.calibration,
        heldout=f"{request.heldout.name}: {rows.size} tokens",
        source=sides[0],
        result=sides[1],
        kl=float(kl.mean(dtype=np.float64)),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=tally.same_top / tally.positions,
        divergence=forks(*continued),
        continuation_tokens=count,
        is_exact=continued[1].is_exact,
        worst=() if record is None else record.worst(WORST),
        max_kl=None if record is None else record.max_kl,
        tuning={} if record is None else record.fates(),
    )


def _draft_ids(bundle: Bundle) -> dict[int, npt.NDArray[np.int64] | None]:
    return {e.exit_layer: read_draft_vocab(bundle, e) for e in bundle.manifest.plan.exits}


def _log_softmax(logits: Floats) -> Floats:
    """Return log probabilities [seq, vocab]."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _peak_rss_bytes(bundle: Bundle) -> int:
    """Return the peak resident memory of a fresh process that decodes a little."""
    command = [sys.executable, "-m", "shortstack", "generate", str(bundle.folder), "The", "--raw", "--json"]
    strategy = ["--strategy", "self-speculative"] if bundle.manifest.plan.exits else []
    done = subprocess.run([*command, "-n", str(_MEMORY_TOKENS), *strategy], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShortstackError(f"{bundle.folder} does not decode: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout)["peak_rss_bytes"])
