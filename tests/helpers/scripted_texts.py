"""What the property tests of the decoding loops draw at random: scripted models, prompts, ways to sample."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from helpers.scripted import ScriptedModel
from shortstack.runtime.decode.sampling import SamplingParams

VOCAB = 8
GREEDY = SamplingParams()
SAMPLINGS = (
    GREEDY,
    SamplingParams(repetition_penalty=1.7),  # greedy through logits
    SamplingParams(temperature=0.8, top_p=0.9, seed=1),
)


def examples(count: int) -> settings:
    return settings(deadline=None, derandomize=True, max_examples=count)


models = st.builds(
    ScriptedModel,
    seed=st.integers(0, 2**32),
    vocab_size=st.just(VOCAB),
    agreement=st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0]) | st.lists(st.booleans(), min_size=1, max_size=9),
    draft_ids=st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1),
)
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
