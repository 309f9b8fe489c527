"""Let tokens leave early, unverified and verified: ``python samples/examples/early_exit.py BUNDLE``."""

import sys

from shortstack import ExitEarly, ExitPolicy, load, parse_criterion

PROMPT = "Will it snow in Tromso on Friday?\n"

with load(sys.argv[1]) as model:
    plain = model.generate(PROMPT, max_new_tokens=32)

    # Unverified: what leaves early is handed out at once, so the text may differ.
    for token in model.stream(PROMPT, max_new_tokens=32, strategy="early-exit", exits="top_prob >= 0.9"):
        print(f"{token.text!r} after {token.exit_layer} layers, confidence {token.confidence:.2f}")

    # Verified: the whole model takes back what it would not have chosen, so the text is that of plain decoding.
    policy = ExitPolicy(parse_criterion("top_prob >= 0.9 and margin >= 0.5"), verify="exact")
    checked = model.generate(PROMPT, max_new_tokens=32, strategy=ExitEarly(policy))
    print(f"same text as plain decoding: {checked.tokens == plain.tokens}")
    print(f"mean depth {checked.stats.mean_exit_layer:.1f} layers")
