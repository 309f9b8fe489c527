"""Continue a text and answer a question: ``python samples/examples/generate.py BUNDLE``."""

import sys

from shortstack import SamplingParams, load

with load(sys.argv[1]) as model:
    # A string goes in as it is; chat messages go through the bundle's chat template.
    story = model.generate("Once upon a time", max_new_tokens=32)
    print(story.text)

    question = [{"role": "user", "content": "Name three colours."}]
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    answer = model.generate(question, max_new_tokens=32, strategy="self-speculative", sampling=sampling)
    print(answer.text)
    print(f"ended by {answer.finish_reason}, {answer.stats.tokens_per_s:.1f} tokens/s")
    print(f"{answer.stats.accepted} of {answer.stats.drafted} drafted tokens were accepted")
