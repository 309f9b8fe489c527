"""GGUF files compared with transformers' own reader, where that is right, and damaged GGUF files."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from helpers.gguf_files import HEAD_DIM, HIDDEN, VOCAB, Edit, byte_level, rows, weights, write
from shortstack.export.arch import resolve
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.parity.reference import Reference
from shortstack.graphs.errors import CheckpointError, UnsupportedError

SAMPLES = [
    "Hello, world!",
    " leading and  double  spaces ",
    "naïve café, Ωmega, 北京, हिन्दी",
    "emoji 👩‍👩‍👧 🎉 and ZWJ",
    "def f(x):\n\treturn x ** y  # comment\r\n",
    "it's they'll we've I'M",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "tabs\t\tand\n\n\nnewlines   \n",
    "",
]
DIGIT_SAMPLES = ["1234567890", "pi is 3.14159, in 2024 (12:30)", "x1y22z333", "½ and ² and ٣"]


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi", "▁h"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 6])
    writer.add_token_scores([0.0] * 259 + [-10.0, -11.0, -12.0, -2.0, -1.0, -3.0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def tokenizer_of(file: Path) -> tuple[Tokenizer, dict[str, Any]]:
    files = open_checkpoint(str(file)).files()
    return Tokenizer.from_str(files["tokenizer.json"].decode()), json.loads(files["tokenizer_config.json"])


def test_names_and_rotary_order_equal_those_of_transformers(tmp_path: Path) -> None:
    tensors = weights(bias=True)
    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", tensors)))
    _, spec = resolve(checkpoint)
    attention = spec.layers[0].attention
    assert (attention.qkv_bias, attention.out_bias, spec.layers[0].mlp.has_bias) == (
        True,
        False,
        False,
    )
    assert (
        spec.layers[0].attention.head_dim,
        spec.layers[0].attention.kv_heads,
        spec.vocab_size,
        spec.tie_word_embeddings,
    ) == (8, 2, VOCAB, True)
    for hf_name, gguf_name in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.q_proj.bias": "blk.0.attn_q.bias",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.self_attn.k_proj.bias": "blk.0.attn_k.bias",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        read = checkpoint.tensor(hf_name)
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, tensors[gguf_name])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantized_rows_equal_what_gguf_dequantizes(tmp_path: Path, kind: str) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    tensors = weights()
    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", tensors, quantization=quantization)))
    resolve(checkpoint)
    value = tensors["blk.0.attn_v.weight"]
    expected = gguf.dequantize(gguf.quantize(value, quantization), quantization)
    np.testing.assert_array_equal(checkpoint.tensor("model.layers.0.self_attn.v_proj.weight"), expected)


def test_the_digest_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", weights())
    assert open_checkpoint(str(file)).digest() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_folder_with_one_gguf_file_stands_for_that_file(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", weights())
    assert open_checkpoint(str(tmp_path)).folder_or_file == tmp_path / "m.gguf"
    write(tmp_path / "n.gguf", weights())
    with pytest.raises(CheckpointError, match=r"2 \.gguf files \(m\.gguf, n\.gguf\)"):
        open_checkpoint(str(tmp_path))


def test_an_output_tensor_unties_the_head(tmp_path: Path) -> None:
    tensors = weights() | {"output.weight": rows(VOCAB, HIDDEN)}
    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", tensors)))
    assert not resolve(checkpoint)[1].tie_word_embeddings
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), tensors["output.weight"])


def test_rope_factors_are_read_from_their_tensor(tmp_path: Path) -> None:
    factors = np.arange(1, HEAD_DIM // 2 + 1, dtype=np.float32)
    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": factors})))
    assert resolve(checkpoint)[1].ropes[0].scaling.kind == "factors"
    np.testing.assert_array_equal(checkpoint.tensor("rope_freqs.weight"), factors)


def test_linear_scaling_and_the_rotary_base_are_read(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_freq_base(500000.0)

    _, spec = resolve(open_checkpoint(str(write(tmp_path / "m.gguf", weights(), edit=edit))))
    assert (spec.ropes[0].scaling.kind, spec.ropes[0].scaling.factor, spec.ropes[0].theta) == ("linear", 4.0, 500000.0)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda w: w.add_expert_count(8), "mixtures of experts"),
        (lambda w: w.add_key_length(16), "partial rotary embedding"),
        (lambda w: w.add_value_length(4), "value_length: found 4, expected the width of the keys, 8"),
        (lambda w: w.add_rope_scaling_attn_factors(1.5), r"rope\.scaling\.attn_factor: found 1\.5, expected 1\.0"),
        (lambda w: w.add_uint16("split.count", 2), "one part of a split model"),
    ],
)
def test_options_that_cannot_be_exported_are_named(tmp_path: Path, edit: Edit, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        resolve(open_checkpoint(str(write(tmp_path / "m.gguf", weights(), edit=edit))))


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"architecture: found 'llama5', .*the nearest is llama"):
        open_checkpoint(str(write(tmp_path / "m.gguf", weights(), architecture="llama5")))


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("block_count", r"llama\.block_count"),
        ("context_length", r"llama\.context_length"),
        ("eps", r"llama\.attention\.layer_norm_rms_epsilon"),
        ("head_count", r"llama\.attention\.head_count"),
    ],
)
def test_a_missing_field_is_named(tmp_path: Path, field: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        open_checkpoint(str(write(tmp_path / "m.gguf", weights(), skip=(field,))))


def test_tensors_of_another_kind_of_model_are_listed(tmp_path: Path) -> None:
    tensors = weights() | {"blk.0.ffn_gate_inp.weight": rows(4, HIDDEN)}
    del tensors["blk.0.ffn_norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing .*post_attention_layernorm.*1 extra \(blk\.0\.ffn_gate_inp"):
        resolve(open_checkpoint(str(write(tmp_path / "m.gguf", tensors))))
    del tensors["token_embd.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor token_embd\.weight"):
        open_checkpoint(str(write(tmp_path / "n.gguf", tensors)))


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", weights(), edit=byte_level)
    whole = file.read_bytes()
    for size in [0, 3, 4, 20, *range(24, len(whole) // 2, 331), len(whole) // 2, len(whole) - 40]:
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            open_checkpoint(str(file))


@pytest.mark.parametrize("offset", [8, 16, 24])
def test_absurd_counts_do_not_keep_the_reader_busy(tmp_path: Path, offset: int) -> None:
    file = write(tmp_path / "m.gguf", weights())
    raw = bytearray(file.read_bytes())
    raw[offset : offset + 8] = struct.pack("<Q", 1 << 60)  # tensors, fields, length of the first key
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        open_checkpoint(str(file))


def test_random_damage_to_the_header_never_raises_a_foreign_error(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", weights(), edit=byte_level)
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        raw = bytearray(whole)
        for position in generator.integers(0, 2500, size=3):
            raw[position] = int(generator.integers(256))
        file.write_bytes(raw)
        try:
            checkpoint = open_checkpoint(str(file))
            checkpoint.files()
            resolve(checkpoint)
        except CheckpointError:
            pass


@pytest.mark.parametrize(
    ("version", "error"), [(1, UnsupportedError), (9, UnsupportedError), (3 << 24, UnsupportedError)]
)
def test_unknown_versions_and_byte_orders_are_refused(tmp_path: Path, version: int, error: type[Exception]) -> None:
    file = write(tmp_path / "m.gguf", weights())
    raw = file.read_bytes()
    file.write_bytes(raw[:4] + struct.pack("<I", version) + raw[8:])
    with pytest.raises(error, match="GGUF version"):
        open_checkpoint(str(file))


def test_a_file_without_a_tokenizer_gives_no_tokenizer_files(tmp_path: Path) -> None:
    assert set(open_checkpoint(str(write(tmp_path / "m.gguf", weights()))).files()) == {"generation_config.json"}


def test_byte_level_tokens_follow_the_split_that_the_file_names(tmp_path: Path) -> None:
    for pre, expected in {"smollm": ["ab", "1", "2"], "gpt-2": ["ab", "12"]}.items():
        file = write(tmp_path / f"{pre}.gguf", weights(), edit=lambda writer, pre=pre: byte_level(writer, pre))  # type: ignore[misc]
        tokenizer, config = tokenizer_of(file)
        assert tokenizer.encode("ab12").tokens == expected
        assert tokenizer.encode("<s>a<think>b</s>").ids == [0, 2, 9, 3, 1]
        assert tokenizer.decode([0, 2, 9, 3, 1]) == "a<think>b"
        assert tokenizer.decode([7, 10]) == "ab ab"
        assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<s>", "</s>", False)


def test_llama_3_adds_bos_and_prefers_whole_words(tmp_path: Path) -> None:
    tokenizer, config = tokenizer_of(
        write(tmp_path / "m.gguf", weights(), edit=lambda writer: byte_level(writer, "llama-bpe"))
    )
    assert tokenizer.encode("ab12").tokens == ["<s>", "ab", "12"]
    assert json.loads(tokenizer.to_str())["model"]["ignore_merges"] is True
    assert config["add_bos_token"] is True


def test_add_bos_token_and_the_chat_template_are_honoured(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        byte_level(writer)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)
        writer.add_chat_template("{{ messages }}")
        writer.add_eot_token_id(9)

    file = write(tmp_path / "m.gguf", weights(), edit=edit)
    tokenizer, config = tokenizer_of(file)
    assert tokenizer.encode("a").ids == [0, 2, 1]
    assert tokenizer.encode("a", add_special_tokens=False).ids == [2]
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, True)
    files = open_checkpoint(str(file)).files()
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": [1, 9]}


def test_sentencepiece_tokens_merge_by_score_and_fall_back_to_bytes(tmp_path: Path) -> None:
    tokenizer, config = tokenizer_of(write(tmp_path / "m.gguf", weights(), edit=sentencepiece))
    assert tokenizer.encode("hi hi").tokens == ["<s>", "▁hi", "▁hi"]
    assert tokenizer.encode("hé").tokens == ["<s>", "▁h", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hi hé").ids) == "hi hé"
    assert (config["add_bos_token"], config["unk_token"]) == (True, "<unk>")


def test_sentencepiece_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = write(tmp_path / "m.gguf", weights(), edit=sentencepiece)
    tokenizer, _ = tokenizer_of(file)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in ["hi", "hi hi", "h i", "hihi é", "a\nb"]:
        assert tokenizer.encode(text).ids == theirs.encode(text), text


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda w: byte_level(w, None), r"tokenizer\.ggml\.pre is missing"),
        (lambda w: byte_level(w, "llama-bep"), r"tokenizer\.ggml\.pre: found 'llama-bep'.*the nearest is llama-bpe"),
        (lambda w: w.add_tokenizer_model("bert") or w.add_token_list(["a"]), r"tokenizer\.ggml\.model: found 'bert'"),
        (lambda w: w.add_tokenizer_model("gpt2"), r"tokenizer\.ggml\.tokens is missing or empty"),
        (
            lambda w: w.add_tokenizer_model("gpt2") or w.add_token_list(["a", "a"]),
            "found 'a' as token 0 and",
        ),
        (lambda w: byte_level(w) or w.add_token_scores([1.0]), "scores: found 1 entries, expected one per token, 11"),
        (lambda w: byte_level(w) or w.add_unk_token_id(99), "unknown_token_id: found 99, expected a token id below 11"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path: Path, edit: Edit, says: str) -> None:
    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", weights(), edit=edit)))
    with pytest.raises(CheckpointError, match=says):
        checkpoint.files()


def test_a_merge_that_forms_no_token_is_refused(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b"])
        writer.add_token_merges(["a b"])

    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", weights(), edit=edit)))
    with pytest.raises(CheckpointError, match="merges: found 'a b', expected two tokens that form a token when joined"):
        checkpoint.files()


def test_smollm2_reads_as_transformers_reads_it(smollm2_gguf: Path, smollm2_reference: Reference) -> None:
    checkpoint = open_checkpoint(str(smollm2_gguf))
    _, spec = resolve(checkpoint)
    assert (
        spec.num_hidden_layers,
        spec.hidden_size,
        spec.layers[0].attention.heads,
        spec.layers[0].attention.kv_heads,
    ) == (
        30,
        576,
        9,
        3,
    )
    assert (spec.vocab_size, spec.ropes[0].theta, spec.tie_word_embeddings) == (49152, 100000.0, True)
    state = smollm2_reference._model.state_dict()
    assert checkpoint.names() == state.keys() - {"lm_head.weight"}
    for name in [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.7.self_attn.k_proj.weight",
        "model.layers.29.self_attn.v_proj.weight",
        "model.layers.15.self_attn.o_proj.weight",
        "model.layers.29.mlp.down_proj.weight",
        "model.layers.3.post_attention_layernorm.weight",
    ]:
        np.testing.assert_array_equal(checkpoint.tensor(name), state[name].numpy(), err_msg=name)


def test_smollm2_tokens_equal_those_of_transformers_except_for_split_digits(smollm2_gguf: Path) -> None:
    from transformers import AutoTokenizer

    files = open_checkpoint(str(smollm2_gguf)).files()
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in SAMPLES:
        assert ours.encode(text).ids == theirs.encode(text), text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    # As of 5.23 transformers does not know the split `smollm` and merges digits.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for text in [*DIGIT_SAMPLES, *SAMPLES]:
        assert ours.encode(text).ids == theirs.encode(text), text
    assert len(ours.encode("1234567890").ids) == 10
    ends = json.loads(files["generation_config.json"])["eos_token_id"]  # as llama.cpp prints them, its own end first
    assert [ours.id_to_token(end) for end in ends] == ["<|im_end|>", "<|endoftext|>", "<reponame>"]
    assert "<|im_start|>" in files["chat_template.jinja"].decode()
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is False
