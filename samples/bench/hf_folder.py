"""``hf_folder.py CHECKPOINT OUT``: any checkpoint we read as a Hugging Face folder of fp32 safetensors.

So that another engine's builder starts from the very numbers that our exporter starts from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.numpy import save_file

from shortstack.export.checkpoint import open_checkpoint
from shortstack.graphs import names


def write_hf_folder(source: str, out: Path) -> None:
    """Write config, tokenizer and weights; a tied head is left out, as transformers does."""
    checkpoint = open_checkpoint(source)
    out.mkdir(parents=True, exist_ok=True)
    config = {**checkpoint.config.data, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name, content in checkpoint.files().items():
        (out / name).write_bytes(content)
    # The builder asks transformers for a tokenizer; naming the class keeps it from guessing.
    tokenizer_config = out / names.TOKENIZER_CONFIG_FILE
    fields = json.loads(tokenizer_config.read_text(encoding="utf-8")) if tokenizer_config.is_file() else {}
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config.write_text(json.dumps(fields, indent=1), encoding="utf-8")
    save_file(
        {name: checkpoint.tensor(name) for name in checkpoint.names()}, out / "model.safetensors", {"format": "pt"}
    )


if __name__ == "__main__":
    write_hf_folder(sys.argv[1], Path(sys.argv[2]))
