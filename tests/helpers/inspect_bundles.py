"""Bundles for tests of `shortstack inspect`: a small spec whose sums are done by hand, and files with no weights."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from shortstack.graphs.bundle import describe_files, open_bundle, write_manifest
from shortstack.graphs.manifest import Manifest, required_files
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.graphs.precision import Precision
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.graphs.spec_json import llama_spec
from shortstack.runtime.inspection.report import Report, build_report

MakeBundle = Callable[..., Path]

VOID_TAGS = {"meta", "br", "link", "img", "input", "hr"}

# hidden 8, 2 heads and 1 KV head of 16, MLP 10, vocabulary 100.
QKV = 8 * (2 + 2 * 1) * 16  # 512
Q_ALONE = 8 * 2 * 16  # 256
O_PROJ = 2 * 16 * 8  # 256
MLP = 3 * 8 * 10  # 240
NORMS = 2 * 8
LAYER = QKV + O_PROJ + MLP + NORMS  # 1024
TABLE = 100 * 8  # embedding, LM head


def tiny_spec(
    layers: int = 4, *, tied: bool = True, kv_map: tuple[int, ...] = (), head_dim: int = 16, biases: bool = False,
    windows: tuple[int, ...] = (), masks_diagonal: bool = False, heads: int = 2, kv_heads: int = 1,
) -> ModelSpec:  # fmt: skip
    return llama_spec(
        model_type="llama",
        num_hidden_layers=layers,
        hidden_size=8,
        intermediate_size=10,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=100,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        kv_map=kv_map,
        qkv_bias=biases,
        attention_out_bias=biases,
        mlp_bias=biases,
        windows=windows,
        masks_diagonal=masks_diagonal,
    )


def write_bundle(
    folder: Path,
    spec: ModelSpec,
    *exits: ExitSpec,
    source: str = "tiny",
    weights: bytes = b"weights",
    dtype: DType = "float32",
    precision: Precision | None = None,
) -> Path:
    """Write a bundle whose files hold nothing but their own names."""
    folder.mkdir()
    plan = SplitPlan(spec.num_hidden_layers, exits)
    for name in required_files(plan):
        # Exits trimmed to equally many rows share their ids.
        (folder / name).write_bytes(b"ids" if name.startswith("draft-vocab") else name.encode())
    (folder / "weights.data").write_bytes(weights)
    write_manifest(
        folder,
        Manifest(
            spec=spec,
            plan=plan,
            dtype=dtype,
            max_length=32,
            files=describe_files(folder),
            source_name=source,
            source_sha256="ab" * 32,
            tools={"shortstack": "0.0.0"},
            precision=precision or Precision(),
        ),
    )
    return folder


def report_of(folder: Path) -> Report:
    return build_report(open_bundle(folder))


class Page(HTMLParser):
    """Parses a page strictly: every tag is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
