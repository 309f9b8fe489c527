"""Our own fields in configs of any family: whose keys and values each layer uses, and what it sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.bad_input import Refused, edit_json
from helpers.families import MadeFamily
from helpers.family_configs import FAMILIES, fields_of, read
from helpers.family_recipes import half_shared
from helpers.family_rows import ROWS
from shortstack.__main__ import run
from shortstack.export.arch import ARCHITECTURES
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.folder import load_twin, save_twin
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.kv_map import identity_kv_map
from shortstack.samples.recipes.training.kv_convert import share_keys_values

OWN = {"kv_map", "windows", "masks_diagonal"}


def shared(family: str, folder: Path) -> tuple[MadeFamily, Path]:
    """A tiny model of a family, and the folder of what it is with half of the layers sharing."""
    made = MadeFamily(next(row for row in ROWS if row.model_type == family), folder)
    twin = load_twin(str(made.checkpoint))
    files = open_checkpoint(str(made.checkpoint)).files()
    save_twin(share_keys_values(twin, half_shared(twin.spec)), folder / "shared", files)
    return made, folder / "shared"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_shares_is_written_and_read_back(family: str) -> None:
    arch, spec = ARCHITECTURES[family], read(fields_of(family))
    if spec.kv_map != identity_kv_map(spec.num_hidden_layers):
        assert not OWN & arch.write_config(spec).keys()
        return
    for masks in (False, True):
        changed = replace(spec, kv_map=half_shared(spec), masks_diagonal=masks)
        written = arch.write_config(changed)
        assert read(written) == changed
        assert not arch.is_in_transformers(changed)
    assert not OWN & arch.write_config(spec).keys()


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3", "gpt2", "gemma2", "starcoder2", "smollm3", "glm4"])
@pytest.mark.parametrize("pattern", [(3, 0), (0, 3), (3, 5), (0, 0), (7, 7)])
def test_any_windows_are_written_and_read_back(family: str, pattern: tuple[int, int]) -> None:
    arch, spec = ARCHITECTURES[family], read(fields_of(family))
    layers = spec.num_hidden_layers
    changed = spec.with_windows(tuple(pattern[layer % 2] for layer in range(layers)))
    assert read(arch.write_config(changed)) == changed
    both = replace(changed, kv_map=half_shared(changed))
    assert read(arch.write_config(both)) == both


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("qwen3", {"kv_map": [0]}, "kv_map: found 1 entries, expected num_hidden_layers"),
        ("qwen3", {"kv_map": "pizza"}, "kv_map: found 'pizza', expected a list of integers"),
        ("qwen2", {"kv_map": [1, 2, 2, 3, 4, 5, 6, 7]}, "expected for each layer one that uses its own K,V"),
        ("qwen2", {"kv_map": [0] * 7 + [10**9]}, "kv_map"),
        ("phi3", {"masks_diagonal": 1}, "masks_diagonal: found 1, expected true or false"),
        ("phi3", {"windows": [1]}, "windows: found 1 entries"),
        ("phi3", {"windows": [-1] * 8}, "windows: found [-1, -1"),
        ("gemma3_text", {"windows": [4] * 8}, "differs from the fields by which gemma3_text also rotates its layers"),
        ("smollm3", {"kv_map": [0, 1, 2, 2, 4, 5, 6, 7]}, "kv_map[3] = 2, but the heads or ropes of these two"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_the_model_are_refused_by_name(family: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(fields_of(family) | fields)
    assert says in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert str(caught.value).endswith(".")


def test_gemma_4_says_once_which_layers_share() -> None:
    row = next(row for row in ROWS if row.name == "Gemma 4 E2B, E4B")
    fields = row.config().to_dict() | {"kv_map": [0, 1, 2, 3, 2, 2]}
    with pytest.raises(CheckpointError, match="and other fields say which layers share keys and values"):
        read(fields)


@pytest.mark.parametrize(
    ("family", "stacked"), [("gpt_neox", "query_key_value"), ("phi3", "qkv_proj"), ("gpt2", "c_attn")]
)
def test_a_stacked_tensor_of_a_layer_that_shares_holds_the_queries_alone(
    family: str, stacked: str, tmp_path: Path, refused: Refused
) -> None:
    made, folder = shared(family, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (made.checkpoint, folder))
    names = sorted(name for name in after if stacked in name and name.endswith("weight"))
    sizes = [before[name].numel() // after[name].numel() for name in names]
    assert sizes[:2] == [1, 1]
    assert all(size > 1 for size in sizes[2:])
    save_file({**after, names[2]: before[names[2]]}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(["export", folder, tmp_path / "out"], "1 misshapen", names[2])


def test_a_layer_that_shares_may_keep_tensors_that_are_never_read(tmp_path: Path) -> None:
    made, folder = shared("qwen3", tmp_path)
    weights = load_file(folder / "model.safetensors")
    export_bundle(ExportSpec(str(folder), tmp_path / "without"))
    kept = {
        name: value for name, value in load_file(made.checkpoint / "model.safetensors").items() if name not in weights
    }
    assert {name.split(".")[-2] for name in kept} == {"k_proj", "v_proj", "k_norm"}
    save_file({**weights, **kept}, folder / "model.safetensors", metadata={"format": "pt"})
    export_bundle(ExportSpec(str(folder), tmp_path / "with"))
    without, also = ((tmp_path / name / "weights.data").read_bytes() for name in ("without", "with"))
    assert without == also


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_parity_compares_with_the_twin(family: str, tmp_path: Path) -> None:
    _, folder = shared(family, tmp_path)
    export_bundle(ExportSpec(str(folder), tmp_path / "out", (1, 2)))
    (tmp_path / "texts").write_text("the hat\n", encoding="utf-8")
    line = ["parity", str(folder), str(tmp_path / "out"), "--text", str(tmp_path / "texts"), "--greedy-tokens", "4"]
    assert run(line) == 0
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1." in name and "k_proj" in name)
    weights[name] += 0.1 * torch.randn_like(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(line) == 1


def test_a_config_that_shares_where_its_tensors_do_not_is_exported_with_the_map(tmp_path: Path) -> None:
    """The tensors of the layers' own keys and values are then never read."""
    made = MadeFamily(next(row for row in ROWS if row.model_type == "qwen2"), tmp_path)
    edit_json(made.checkpoint / "config.json", kv_map=[0, 1, 1, 1])
    bundle = export_bundle(ExportSpec(str(made.checkpoint), tmp_path / "out", (2,)))
    assert bundle.manifest.spec.kv_map == (0, 1, 1, 1)
