"""Megatron checkpoints that are damaged, hostile or unsupported give a clear error and leave nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import exit_nodes, megatron
from helpers.bad_input import Refused, left_behind
from helpers.megatron import Layout
from helpers.tiny_models import BASE, SWITCHES, TinyBundles
from shortstack.export.twin.folder import load_twin
from shortstack.export.twin.model import Twin
from shortstack.graphs.plan import ExitSpec

TIED = next(tiny for tiny in SWITCHES if tiny.name == "tied")
EXITS = (ExitSpec(1, norm="own", head="own"), ExitSpec(2, norm="own", head="own"))
Refuses = Callable[..., None]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def twin(tiny_bundles: TinyBundles) -> Twin:
    return load_twin(str(tiny_bundles.checkpoint(BASE)))


@pytest.fixture
def write(twin: Twin, tmp_path: Path) -> Callable[..., Path]:
    """Write a model with two exits; the arguments are those of :func:`megatron.write`."""

    def write(layout: Layout | None = None, **options: Any) -> Path:
        nodes = [exit_nodes.random_exit(twin.spec, e) for e in EXITS]
        return megatron.write(tmp_path / "ee", twin, nodes, layout, **options)

    return write


@pytest.fixture
def refuses(refused: Refused, tmp_path: Path) -> Refuses:
    """Check that the export is refused with these words and leaves nothing behind."""

    def refuses(folder: Path, *says: str, options: tuple[str, ...] = ()) -> None:
        before = left_behind(tmp_path)
        refused(["export", folder, tmp_path / "out", *options], *says)
        assert left_behind(tmp_path) == before

    return refuses


def rank_file(folder: Path, name: str = "mp_rank_00") -> Path:
    return folder / f"iter_{megatron.ITERATION:07d}" / name / megatron.RANK_FILE


# Pickles


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["args", "model", "optimizer"])
def test_code_in_a_pickle_is_not_run(write: Callable[..., Path], refuses: Refuses, tmp_path: Path, place: str) -> None:
    folder = write()
    trap = Touch(tmp_path / "ran")
    megatron.save(rank_file(folder), {}, {}, **{place: trap})
    refuses(folder, "mkdir", "may run code", "save it again without that object")
    assert not trap.path.exists()


def test_an_object_of_an_unknown_class_is_named_and_not_created(write: Callable[..., Path], refuses: Refuses) -> None:
    folder = write(surprise=re.compile("a"))
    refuses(folder, "holds a re._compile", "argparse.Namespace")


def test_options_that_are_objects_do_not_count_as_numbers(write: Callable[..., Path], refuses: Refuses) -> None:
    folder = write(num_layers=torch.float16, hidden_size=[torch.zeros(2)])
    refuses(folder, "args.hidden_size", "found '<list>'", "expected an integer")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"not a pickle at all" * 100])
def test_a_file_that_is_not_a_torch_archive_is_named(
    write: Callable[..., Path], refuses: Refuses, content: bytes
) -> None:
    folder = write()
    rank_file(folder).write_bytes(content)
    refuses(folder, megatron.RANK_FILE, "is not a complete torch.save file", "Copy it again")


def test_a_file_in_the_format_before_zip_archives_is_named(write: Callable[..., Path], refuses: Refuses) -> None:
    torch.save({"args": 1}, rank_file(folder := write()), _use_new_zipfile_serialization=False)
    refuses(folder, "expected a zip archive, as torch 1.6 and later write")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(write: Callable[..., Path], refuses: Refuses, share: float) -> None:
    file = rank_file(folder := write(Layout(1, 2)), "mp_rank_00_001")
    os.truncate(file, int(file.stat().st_size * share))
    refuses(folder, "mp_rank_00_001", "is not a complete torch.save file")


@pytest.mark.parametrize("content", [{}, [], {"args": {}}, {"args": None, "model": {}}], ids=str)
def test_a_pickle_of_something_else_is_named(write: Callable[..., Path], refuses: Refuses, content: object) -> None:
    torch.save(content, rank_file(folder := write()))
    refuses(folder, "is not a checkpoint of Megatron")


def test_a_dict_that_holds_itself_does_not_hang(write: Callable[..., Path], refuses: Refuses) -> None:
    def nest(model: dict[str, Any]) -> None:
        model["again"] = model

    refuses(write(edit=nest), "model.again", "found a dict")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(3, dtype=torch.int8), "torch.int8"),
        (torch.zeros(3).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(1).expand(1 << 40), "4 bytes for a tensor of [1099511627776]"),
        (None, "NoneType"),
        ([torch.zeros(2)], "list"),
    ],
    ids=["int8", "sparse", "expanded", "none", "list"],
)
def test_tensors_of_unsupported_kinds_are_named(
    write: Callable[..., Path], refuses: Refuses, value: object, says: str
) -> None:
    folder = write(edit=lambda model: model["language_model"]["encoder"].update({"final_norm.weight": value}))
    refuses(folder, "model.language_model.encoder.final_norm.weight", says, "torch.bfloat16")


# Files


@pytest.mark.parametrize("name", ["mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", "mp_rank_01_001"])
def test_a_missing_rank_is_named(write: Callable[..., Path], refuses: Refuses, name: str) -> None:
    rank_file(folder := write(Layout(2, 2)), name).unlink()
    refuses(folder, "mp_rank_00_000" if name == "mp_rank_00_000" else f"1 missing ({name})", "Copy the whole")


def test_the_error_says_which_stages_ee_tuning_does_not_save(write: Callable[..., Path], refuses: Refuses) -> None:
    rank_file(folder := write(Layout(1, 2), tune_exit=True), "mp_rank_00_001").unlink()
    refuses(folder, "1 missing (mp_rank_00_001)", "add the others from the checkpoint that was tuned")


@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (4, 2), (2, 4), (0, 1), (-1, -1), (100_000, 100_000)])
def test_numbers_of_ranks_and_stages_that_differ_from_the_files_are_named(
    write: Callable[..., Path], refuses: Refuses, ranks: int, stages: int
) -> None:
    folder = write(Layout(2, 2), tensor_model_parallel_size=ranks, pipeline_model_parallel_size=stages)
    refuses(folder, "tensor", "pipeline")


@pytest.mark.parametrize("text", ["", "abc", "-5", "1e3", "100\n200", "../x", "\x00", "9" * 100])
def test_a_tracker_file_that_is_not_valid_is_named(write: Callable[..., Path], refuses: Refuses, text: str) -> None:
    (folder := write()).joinpath("latest_checkpointed_iteration.txt").write_text(text)
    refuses(folder, "latest_checkpointed_iteration.txt", "the number of an iteration, or release")


def test_an_iteration_that_does_not_exist_is_named(write: Callable[..., Path], refuses: Refuses) -> None:
    (folder := write()).joinpath("latest_checkpointed_iteration.txt").write_text("7")
    refuses(folder, "iter_0000007", "found iter_0000100")
    (folder / "latest_checkpointed_iteration.txt").unlink()
    refuses(folder, "has no latest_checkpointed_iteration.txt", "iter_0000100", "Name one of these folders")


@pytest.mark.parametrize("what", ["tracker", "iteration", "rank", "file", "tokenizer"])
def test_a_link_out_of_the_folder_is_not_followed(
    write: Callable[..., Path], refuses: Refuses, tmp_path: Path, what: str
) -> None:
    folder = write()
    file = rank_file(folder)
    path = {
        "tracker": folder / "latest_checkpointed_iteration.txt",
        "iteration": file.parent.parent,
        "rank": file.parent,
        "file": file,
        "tokenizer": folder / "tokenizer.json",
    }[what]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refuses(folder, "leads out of the folder")


def test_a_missing_tokenizer_is_requested(write: Callable[..., Path], refuses: Refuses) -> None:
    (folder := write()).joinpath("tokenizer.json").unlink()
    refuses(folder, "has no tokenizer.json", "saves no tokenizer", "Put tokenizer.json and tokenizer_config.json")


def test_the_tokenizer_of_a_larger_model_is_refused(
    write: Callable[..., Path], refuses: Refuses, tiny_bundles: TinyBundles
) -> None:
    folder = write(
        edit=lambda model: model["language_model"]["embedding"]["word_embeddings"].update(weight=torch.ones(96, 64))
    )
    refuses(folder, "tokenizer.json belongs to another model", "found 300 token ids", "at most 96")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff"])
def test_a_tokenizer_that_is_not_valid_is_named(write: Callable[..., Path], refuses: Refuses, content: bytes) -> None:
    (folder := write()).joinpath("tokenizer.json").write_bytes(content)
    refuses(folder, "tokenizer.json")


# Options


def test_all_differences_from_llama_are_listed_at_once(write: Callable[..., Path], refuses: Refuses) -> None:
    folder = write(normalization="LayerNorm", swiglu=False, rotary_percent=0.5, num_experts=8)
    refuses(
        folder,
        "normalization = 'LayerNorm', swiglu = False, rotary_percent = 0.5, num_experts = 8",
        "normalization = 'RMSNorm', swiglu = True, rotary_percent = 1.0, num_experts = None",
        "--normalization RMSNorm --swiglu",
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position_embedding_type", "learned_absolute"),
        ("rotary_interleaved", True),
        ("use_rope_scaling", True),
        ("apply_layernorm_1p", True),
        ("apply_residual_connection_post_layernorm", True),
        ("transformer_impl", "transformer_engine"),
        ("retro_add_retriever", True),
        ("virtual_pipeline_model_parallel_size", 2),
        ("standalone_embedding_stage", True),
        ("normalization", None),
        ("normalization", [1] * 1000),
    ],
)
def test_a_model_that_is_not_a_llama_is_refused(
    write: Callable[..., Path], refuses: Refuses, field: str, value: object
) -> None:
    refuses(write(**{field: value}), field, "a model that is not a Llama")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, value)
            for field in ("num_layers", "hidden_size", "num_attention_heads")
            for value in (0, -1, "4", 1.5)
        ),
        ("num_layers", 10**12),
        ("max_position_embeddings", 10**30),
        ("hidden_size", 10**30),
        ("rotary_base", 10**400),
        ("rotary_seq_len_interpolation_factor", float("nan")),
        ("num_layers", None),
        ("kv_channels", 0),
        ("kv_channels", 15),
        ("ffn_hidden_size", 95),
        ("num_query_groups", 3),
        ("num_query_groups", 0),
        ("num_query_groups", 4),
        ("norm_epsilon", 0.0),
        ("norm_epsilon", float("nan")),
        ("padded_vocab_size", 512),
        ("exit_layer_nums", [0]),
        ("exit_layer_nums", [5]),
        ("exit_layer_nums", [1, 1]),
        ("exit_layer_nums", [True]),
        ("exit_layer_nums", 3),
        ("exit_layer_nums", ["1"]),
        ("exit_layer_nums", [1, 2, 3]),
        ("exit_layer_nums", [1]),
        ("use_exit_mlp", True),
        ("use_exit_block", True),
        ("use_exit_norm", False),
        ("untie_exit_output_weights", False),
        ("untie_embeddings_and_output_weights", False),
        ("add_bias_linear", True),
        ("tensor_model_parallel_size", None),
        ("rotary_seq_len_interpolation_factor", 0),
    ],
)
def test_options_that_do_not_fit_the_tensors_are_refused(
    write: Callable[..., Path], refuses: Refuses, field: str, value: object
) -> None:
    refuses(write(**{field: value}), "iter_0000100")


def test_exits_of_an_unknown_kind_are_refused(write: Callable[..., Path], refuses: Refuses) -> None:
    refuses(write(use_exit_mlp=True, use_exit_block=True), "use_exit_mlp together with use_exit_block")
    refuses(write(use_exit_mlp=True, pre_exit=True), "use_exit_mlp together with pre_exit")


def test_exits_at_the_ends_of_the_model_are_refused_unless_others_are_chosen(
    twin: Twin, tmp_path: Path, refuses: Refuses
) -> None:
    nodes = [exit_nodes.random_exit(twin.spec, ExitSpec(e, norm="own", head="own")) for e in (0, 2)]
    folder = megatron.write(tmp_path / "ee", twin, nodes, Layout(is_pre=True))
    refuses(folder, "before its first", "after 0 of 4 layers", "Choose others: --exit-layer 2")
    refuses(folder, "before its first", options=("--exit-layer", "0"))


# Tensors


def drop(name: str) -> Change:
    return lambda model: model["language_model"]["encoder"].pop(name)


def cut(name: str) -> Change:
    def change(model: dict[str, Any]) -> None:
        model["language_model"]["encoder"][name] = model["language_model"]["encoder"][name][:-1]

    return change


LAYER = (
    "input_norm.weight",
    "self_attention.query_key_value.weight",
    "self_attention.dense.weight",
    "post_attention_norm.weight",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
    "exit_norm.weight",
)


@pytest.mark.parametrize("change", [drop, cut], ids=["missing", "misshapen"])
@pytest.mark.parametrize("name", [*(f"layers.1.{part}" for part in LAYER), "final_norm.weight"])
def test_a_wrong_tensor_is_named(
    write: Callable[..., Path], refuses: Refuses, name: str, change: Callable[[str], Change]
) -> None:
    refuses(write(Layout(2), edit=change(name)), "iter_0000100 does not hold the")


def test_all_wrong_tensors_are_listed(write: Callable[..., Path], refuses: Refuses) -> None:
    def spoil(model: dict[str, Any]) -> None:
        encoder = model["language_model"]["encoder"]
        encoder["layers.0.mlp.surprise"] = encoder.pop("layers.0.input_norm.weight")
        encoder["layers.2.self_attention.dense.weight"] = torch.zeros(2, 2)

    refuses(
        write(edit=spoil),
        "1 missing (model.layers.0.input_layernorm.weight)",
        "1 extra (layers.0.mlp.surprise)",
        "1 misshapen (model.layers.2.self_attn.o_proj.weight is [2, 2], not [64, 64])",
    )


def test_all_wrong_tensors_of_exits_are_listed(write: Callable[..., Path], refuses: Refuses) -> None:
    def spoil(model: dict[str, Any]) -> None:
        model["language_model"]["encoder"].pop("layers.0.exit_norm.weight")
        model["language_model"]["exit_output_layer"]["1.weight"] = torch.zeros(304, 3)

    refuses(
        write(edit=spoil),
        "layers.0.exit_norm.weight is missing",
        "head.weight of exit_output_layer.2.weight is [300, 3], not [300, 64]",
    )


def test_values_of_an_exit_that_are_not_finite_are_named(write: Callable[..., Path], refuses: Refuses) -> None:
    folder = write(
        edit=lambda model: model["language_model"]["encoder"]["layers.1.exit_norm.weight"].fill_(float("inf"))
    )
    refuses(folder, "exits.2.norm.weight", "not finite")


def test_ranks_with_different_tensors_are_named(write: Callable[..., Path], refuses: Refuses) -> None:
    count = iter(range(2))
    folder = write(Layout(2), edit=lambda model: drop("final_norm.weight")(model) if next(count) else None)
    refuses(folder, "do not hold the same tensors", "final_norm.weight")


def test_a_repeated_stage_is_named(write: Callable[..., Path], refuses: Refuses) -> None:
    folder = write(Layout(1, 2))
    rank_file(folder, "mp_rank_00_001").write_bytes(rank_file(folder, "mp_rank_00_000").read_bytes())
    refuses(folder, "mp_rank_00_001", "as another stage does")


def test_a_tied_head_that_differs_is_named(tiny_bundles: TinyBundles, tmp_path: Path, refuses: Refuses) -> None:
    twin = load_twin(str(tiny_bundles.checkpoint(TIED)))

    def change(model: dict[str, Any]) -> None:
        if "word_embeddings_for_head" in model:
            model["word_embeddings_for_head"]["weight"] = model["word_embeddings_for_head"]["weight"] + 1

    folder = megatron.write(tmp_path / "ee", twin, layout=Layout(1, 2), edit=change)
    refuses(folder, "lm_head.weight differs from model.embed_tokens.weight")
