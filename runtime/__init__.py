"""From a bundle to tokens: sessions, KV buffers, decoding loops, sampling, text.

Never needs torch, transformers or onnx. The public names are those of :mod:`shortstack`, re-exported here.

=============  ========================================================================================================
engine         sessions, KV buffers, prebuilt bindings, the stack of segments
text           tokenizer, streamed text, stop strings
decode         the decoding loops and what they share: choice, sampling, drafters, draft length, the running text
early_exit     tokens that leave at an exit, and the layers above that catch up
request        a generation as a value
loops          the decoding loop for a request
model          a loaded bundle: text in, text out
calibration    thresholds for early exit with a guarantee
inspection     what a bundle holds; decodes nothing
workers        a batch on several machines, through Ray Data
commands       the command line
=============  ========================================================================================================

Each line may import those above it, but none below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import shortstack

if TYPE_CHECKING:
    from shortstack import DraftPolicy as DraftPolicy
    from shortstack import ExitPolicy as ExitPolicy
    from shortstack import FromLookup as FromLookup
    from shortstack import Model as Model
    from shortstack import Placement as Placement
    from shortstack import Result as Result
    from shortstack import SamplingParams as SamplingParams
    from shortstack import TextIndex as TextIndex
    from shortstack import load as load
    from shortstack import parse_criterion as parse_criterion


def __getattr__(name: str) -> Any:
    if name in shortstack.__all__:
        return getattr(shortstack, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
