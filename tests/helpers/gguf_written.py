"""Tiny models as GGUF files with a vocabulary, and what their bundles compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from helpers.gguf_cases import VOCAB, GgufCase
from helpers.gguf_converter import convert
from helpers.gguf_files import Edit, byte_level
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.runtime.engine.open_graphs import open_graphs
from shortstack.runtime.engine.whole_text import run_text

TEXT = [3, 17, 5, 5, 39, 0, 21, 8, 30, 11, 2, 33]  # longer than the windows of the cases


def written(case: GgufCase, folder: Path, edit: Edit = lambda writer: None, **options: Any) -> tuple[Path, Path]:
    model = case.save(folder / "model")
    return model, converted(model, folder / "m.gguf", case.architecture, edit, **options)


def converted(model: Path, file: Path, architecture: str, edit: Edit = lambda writer: None, **options: Any) -> Path:
    """Write a folder of a model with ``VOCAB`` tokens as a GGUF file."""

    def with_tokenizer(writer: gguf.GGUFWriter) -> None:
        byte_level(writer)
        few = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        writer.add_token_list([*few, *(f"[{index}]" for index in range(len(few), VOCAB))])
        writer.add_token_types([*writer.kv_data[0]["tokenizer.ggml.token_type"].value, *[1] * (VOCAB - len(few))])
        writer.add_pad_token_id(0)
        edit(writer)

    return convert(model, file, architecture, edit=with_tokenizer, **options)


def logits(bundle_of: Path, out: Path) -> np.ndarray:
    graphs = open_graphs(export_bundle(ExportSpec(str(bundle_of), out, (1,))))
    heads = run_text(graphs, TEXT).heads
    return np.stack([heads[depth] for depth in sorted(heads)])
