r"""A model to train from scratch: a tokenizer learnt from its text, and a small Llama config.

::

    python -m shortstack.samples.recipes.new_model FOLDER --data train.jsonl --prompt '{prompt}\n'
    python -m shortstack.samples.recipes.layerskip FOLDER OUT --from-scratch --data train.jsonl ...

FOLDER holds ``config.json``, ``tokenizer.json`` and ``generation_config.json``; weights are drawn by the recipe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shortstack.export.arch import ARCHITECTURES
from shortstack.export.twin.model import Twin
from shortstack.graphs import names
from shortstack.graphs.bundle import staged_folder
from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import ModelSpec
from shortstack.graphs.spec_json import llama_spec
from shortstack.samples.command import command_errors
from shortstack.samples.recipes.training.data import read_texts

END = "<|end|>"


def new_model(folder: Path, texts: list[str], spec: ModelSpec, initializer_range: float = 0.02) -> int:
    """Write the folder.

    Args:
        folder: Where to.
        texts: What the tokenizer learns from.
        spec: The model; its ``vocab_size`` is what the tokenizer may have at most.
        initializer_range: Standard deviation of the weights that a recipe will draw; it goes into the config.

    Returns:
        How many parameters the model has.

    Raises:
        BundleError: The folder exists already.
        RequestError: There is too little text for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != spec.vocab_size:
        raise RequestError(
            "--vocab is more than the text has",
            found=spec.vocab_size,
            expected=f"at most {tokenizer.get_vocab_size()}",
        )
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Twin(spec).parameters())
    with staged_folder(folder) as staged:
        config = ARCHITECTURES[spec.model_type].write_config(spec) | {"initializer_range": initializer_range}
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(str(staged / names.TOKENIZER_FILE))
        described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": None}
        (staged / names.TOKENIZER_CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        end_id = tokenizer.token_to_id(END)
        (staged / names.GENERATION_CONFIG_FILE).write_text(
            json.dumps({"eos_token_id": end_id}) + "\n", encoding="utf-8"
        )
    return parameters


@click.command(context_settings={"max_content_width": 120})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSON lines to learn a tokenizer from.")
@click.option("--prompt", default="{prompt}\\n", show_default=True, help="Template of a prompt over a row's fields.")
@click.option("--completion", default="{completion}", show_default=True, help="Template of what follows.")
@click.option("--vocab", type=click.IntRange(300), default=1024, show_default=True, help="Tokens.")
@click.option("--layers", type=click.IntRange(2), default=8, show_default=True, help="Layers.")
@click.option("--hidden", type=click.IntRange(16), default=128, show_default=True, help="Width.")
@click.option("--intermediate", type=click.IntRange(16), help="Width of the MLP [8/3 of --hidden].")
@click.option("--heads", type=click.IntRange(1), default=4, show_default=True, help="Query heads.")
@click.option("--kv-heads", type=click.IntRange(1), default=2, show_default=True, help="Key/value heads.")
@click.option("--context", type=click.IntRange(16), default=512, show_default=True, help="Longest text in tokens.")
@click.option("--initializer-range", type=click.FloatRange(0, min_open=True), default=0.02, show_default=True,
              help="Standard deviation of the weights to be drawn; narrow models learn faster with more.")  # fmt: skip
def main(
    folder: Path, data: Path, prompt: str, completion: str, vocab: int, layers: int, hidden: int,
    intermediate: int | None, heads: int, kv_heads: int, context: int, initializer_range: float,
) -> None:  # fmt: skip
    """Write the tokenizer and the config of a new model to FOLDER."""
    with command_errors():
        if hidden % heads or (hidden // heads) % 2 or heads % kv_heads:
            raise RequestError(
                "--hidden, --heads and --kv-heads do not fit",
                found=f"{hidden}, {heads}, {kv_heads}",
                expected="hidden / heads even, and kv heads a divisor of heads",
            )
        spec = llama_spec(
            model_type="llama",
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=intermediate or -(-hidden * 8 // 3 // 32) * 32,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            vocab_size=vocab,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=context,
            tie_word_embeddings=True,
        )
        texts = read_texts(data, prompt.replace("\\n", "\n"), completion.replace("\\n", "\n"))
        parameters = new_model(folder, texts, spec, initializer_range)
    click.echo(f"{folder}: {parameters} parameters, {vocab} tokens")


if __name__ == "__main__":
    main()
