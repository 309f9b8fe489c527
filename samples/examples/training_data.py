"""Write data that the recipes train on, and count its tokens: ``python samples/examples/training_data.py BUNDLE``."""

import json
import sys
from pathlib import Path

from shortstack import load

ROWS = [
    {"utterance": "play some jazz", "parse": "[IN:PlayMusic [SL:genre jazz]]"},
    {"utterance": "will it rain in Lyon", "parse": "[IN:GetWeather [SL:condition_description rain] [SL:city Lyon]]"},
]
FILE = Path("train.jsonl")

# One JSON object a line, with any fields: --prompt and --completion put them together. Only the completion is learnt.
FILE.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
with load(sys.argv[1]) as model:
    for row in ROWS:
        prompt, completion = (model.tokenizer.encode(text) for text in (row["utterance"] + "\n", row["parse"]))
        print(f"{len(prompt)} tokens to read, {len(completion)} to learn: {row['utterance']}")
print(f"wrote {FILE}, which this command reads (it needs a few thousand rows):")
print("python -m shortstack.samples.recipes.layerskip MODEL run --lora-rank 8 --exit-layer 4 \\")
print(f"    --data {FILE} --prompt '{{utterance}}\\n' --completion '{{parse}}'")
