"""A worker of no engine, which counts instead of decoding: ``scripted_worker.py MODEL THREADS``."""

import json
import sys

STEP_S = 0.5


def answer(request: dict) -> dict:
    if request["op"] == "start":
        return {"tokens": [0], "elapsed_s": STEP_S}
    if request["op"] == "chunk":
        count = request["count"]
        return {"tokens": list(range(count)), "elapsed_s": STEP_S * count, "cpu_s": STEP_S * count}
    if request["op"] == "batch":  # a step takes as long for all texts as for one
        count, rows = request["tokens"], [list(range(request["tokens"])) for _ in request["prompts"]]
        return {"tokens": rows, "elapsed_s": STEP_S * count, "cpu_s": 2 * STEP_S * count}
    return {"rss_bytes": 1_000_000, "pss_bytes": 2_000_000, "peak_bytes": 3_000_000}


print(json.dumps({"load_s": 1000.0}), flush=True)
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
