"""Reads the checkpoints of EE-LLM and of Megatron-LM's GPT as if they were Hugging Face checkpoints of ``llama``.

EE-LLM (https://arxiv.org/abs/2312.04916) stores each exit in the layer that it belongs to. They become exits of
shortstack. ``layers.{i}`` counts from 0 over the whole model::

    exit_output_layer.{number}.weight   the exit's own head; without it, the head is the input embedding
    layers.{number - 1}.exit_norm.weight
    layers.{number - 1}.mlp.branch.*    the exit's MLP; the layer's own is mlp.trunk.*
    layers.{number - 1}.exit_block.*    a whole layer

megatron_files.py finds the files, megatron_config.py reads the options, megatron_merge.py joins the shards.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from shortstack.export.checkpoint.checkpoint import (
    Progress,
    StoredBlocks,
    StoredExit,
    hash_files,
    unknown_tensor,
)
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.hf import member
from shortstack.export.checkpoint.megatron_config import (
    MegatronExit,
    hugging_face_config,
    read_args,
    read_exits,
    vocabulary_rows,
)
from shortstack.export.checkpoint.megatron_files import TRACKER_FILE, Find, iteration_folder, open_all, open_first
from shortstack.export.checkpoint.megatron_merge import Merger, Piece, collect_shards, layer_pieces, mlp_pieces
from shortstack.export.checkpoint.resolved_tokenizer import MORE_FILES
from shortstack.export.checkpoint.tokenizer_files import complete_files
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.exit_parts import exit_parts
from shortstack.graphs.names import TEXT_FILES
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.read_file import read_file
from shortstack.graphs.spec import ModelSpec

_EMBEDDING = Piece("word_embeddings.weight", "rows", "vocab")
_MAX_LISTED = 10

Floats = npt.NDArray[np.float32]


class MegatronCheckpoint:
    """A folder that Megatron saved to, or one iteration's folder in it; the methods are those of ``Checkpoint``.

    Args:
        folder: The folder.
        source: The name that the user gave, if it is not the folder itself.
        follow_links: Follow links that lead out of the folder.

    Raises:
        CheckpointError: A file is missing, damaged or outside the folder, or the files do not fit together.
        UnsupportedError: The model cannot be exported, or a file holds objects that may run code.
    """

    def __init__(self, folder: Path, source: str | None = None, *, follow_links: bool = False) -> None:
        self.source = str(folder) if source is None else source
        find = partial(member, follow_links=follow_links)
        self._find: Find = find
        self.folder_or_file = iteration_folder(folder, find)
        above = folder.resolve().parent
        is_iteration = self.folder_or_file == folder and (above / TRACKER_FILE).is_file()
        self._homes = [folder, above] if is_iteration else [folder]  # folders that may hold the tokenizer
        first = open_first(folder, self.folder_or_file, find)
        self._args = read_args(first.args, str(first.path))
        config = hugging_face_config(self._args, first.version)
        self._exits = read_exits(self._args)
        stages = open_all(
            folder,
            self.folder_or_file,
            first,
            find,
            ranks=self._args.read(int, "tensor_model_parallel_size"),
            stages=self._args.read(int, "pipeline_model_parallel_size"),
        )
        self._paths = [file.path for files in stages for file in files]
        shards = collect_shards(stages, [exit_.number for exit_ in self._exits])
        if _EMBEDDING.source not in shards:
            raise CheckpointError(f"{self._paths[0]} has no language_model.embedding.word_embeddings.weight")
        padded = sum(shard.shape[0] if shard.ndim else 0 for shard in shards[_EMBEDDING.source])
        vocab_size = self._vocab_size(padded)
        self.config = Config(config | {"vocab_size": vocab_size}, f"{first.path}: args as a config of llama")
        self._merger = Merger(shards, self.config, vocab_size)
        pieces = self._pieces()
        self._pieces_of_exits = {exit_: self._exit_pieces(exit_) for exit_ in self._exits}
        used = {piece.source for part in (pieces, *self._pieces_of_exits.values()) for piece in part.values()}
        self._tensors = {name: piece for name, piece in pieces.items() if piece.source in shards}
        # Whatever no piece uses keeps its own name, so that it is refused as an extra tensor.
        self._tensors |= {name: Piece(name, "same") for name in shards.keys() - used}

    def names(self) -> frozenset[str]:
        """Return the names of all tensors except those of the exits."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._merger.shape(self._piece(name))

    def tensor(self, name: str) -> Floats:
        """Merge the shards of one tensor and return it as C-contiguous float32."""
        return self._merger.read(self._piece(name))

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return None: Megatron stores floats."""
        self._piece(name)
        return None

    def files(self) -> dict[str, bytes]:
        """Return the content of the tokenizer's files that the user added to the folder, and a generation config."""
        found = {name: content for name in (*TEXT_FILES, *MORE_FILES) if (content := self._read(name)) is not None}
        if names.TOKENIZER_FILE not in found:
            raise CheckpointError(
                f"{self._homes[-1]} has no {names.TOKENIZER_FILE}, and Megatron saves no tokenizer",
                remedy=f"put {names.TOKENIZER_FILE} and {names.TOKENIZER_CONFIG_FILE} of the model's tokenizer there: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)",
            )
        return complete_files(found, self.config, str(self._homes[-1]), is_resolved=False)

    def digest(self, progress: Progress | None = None) -> str:
        """Return the SHA-256 over the files of all ranks, stage by stage, each preceded by its name and size."""
        return hash_files(self._paths, label=True, progress=progress)

    def exits(self, spec: ModelSpec) -> tuple[StoredExit, ...]:
        """Return the exits that the model was trained with, by ascending depth."""
        found: list[StoredExit] = []
        problems: list[str] = []
        for exit_, pieces in self._pieces_of_exits.items():
            has_head = exit_.has_own_head or not spec.tie_word_embeddings
            exit_spec = ExitSpec(
                exit_.exit_layer, branch=exit_.branch, norm=exit_.norm, head="own" if has_head else "shared"
            )
            wanted = exit_parts(spec, exit_spec)
            for part, shape in wanted.items():
                source = pieces[part].source
                if source not in self._merger.shards:
                    problems.append(f"{source} is missing")
                elif (stored := self._merger.shape(pieces[part])) != shape:
                    problems.append(f"{part} of {source} is {list(stored)}, not {list(shape)}")
            found.append(StoredExit(exit_spec, partial(self._read_exit, exit_, tuple(wanted))))
        if problems:
            problems = list(dict.fromkeys(problems))  # q, k and v are one tensor
            more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
            raise CheckpointError(
                f"{self.folder_or_file} does not hold the exits that its args describe: "
                f"{'; '.join(problems[:_MAX_LISTED])}{more}",
                remedy="check that all files belong to the same model",
            )
        return tuple(sorted(found, key=lambda stored_exit: stored_exit.spec.exit_layer))

    def _read_exit(self, exit_: MegatronExit, parts: tuple[str, ...]) -> dict[str, Floats]:
        pieces = self._pieces_of_exits[exit_]
        tensors = {names.exit_weight(exit_.exit_layer, part): self._merger.read(pieces[part]) for part in parts}
        if bad := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
            raise CheckpointError(f"{self.folder_or_file}: {', '.join(bad)} have values that are not finite")
        return tensors

    def _pieces(self) -> dict[str, Piece]:
        """Return the piece of each tensor of the model, without its exits."""
        is_tied = self.config.read(bool, "tie_word_embeddings")
        pieces = {
            "model.embed_tokens.weight": _EMBEDDING,
            "model.norm.weight": Piece("final_norm.weight", "same"),
            # With a pipeline, the last stage of a tied model holds a copy of the embedding.
            "lm_head.weight": Piece(
                f"{'word_embeddings_for_head' if is_tied else 'output_layer'}.weight", "rows", "vocab"
            ),
        }
        trunks = {exit_.number - 1 for exit_ in self._exits if exit_.branch == "mlp"}
        for layer in range(self.config.read(int, "num_hidden_layers")):
            mlp = "mlp.trunk" if layer in trunks else "mlp"
            pieces |= layer_pieces(f"layers.{layer}.", f"model.layers.{layer}.", mlp)
        return pieces

    def _exit_pieces(self, exit_: MegatronExit) -> dict[str, Piece]:
        """Return the piece of each tensor of an exit, by part."""
        layer = f"layers.{exit_.number - 1}"
        head = Piece(f"exit_output_layer.{exit_.number}.weight", "rows", "vocab") if exit_.has_own_head else _EMBEDDING
        pieces = {"head.weight": head}
        if exit_.norm == "own":
            pieces["norm.weight"] = Piece(f"{layer}.exit_norm.weight", "same")
        if exit_.branch == "mlp":
            pieces |= mlp_pieces(f"{layer}.mlp.branch", "mlp")
        if exit_.branch == "block":
            pieces |= layer_pieces(f"{layer}.exit_block.", "block.")
        return pieces

    def _vocab_size(self, padded: int) -> int:
        content = self._read(names.TOKENIZER_FILE)
        try:
            tokenizer = None if content is None else Tokenizer.from_str(content.decode())
        except Exception:  # the library raises no narrower error; the export reports what is wrong with the file
            tokenizer = None
        if tokenizer is None:
            return vocabulary_rows(self._args, padded, 0)
        ids = 1 + max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        if ids > padded:
            raise CheckpointError(
                f"{self._homes[-1]}: {names.TOKENIZER_FILE} belongs to another model",
                found=f"{ids} token ids",
                expected=f"at most {padded}, the rows of the embedding",
                remedy="put the tokenizer that the model was trained with there",
            )
        return vocabulary_rows(self._args, padded, 1 + max(tokenizer.get_vocab().values(), default=-1))

    def _read(self, name: str) -> bytes | None:
        path = next((path for home in self._homes if (path := self._find(home, name)) is not None), None)
        return None if path is None else read_file(path, CheckpointError)

    def _piece(self, name: str) -> Piece:
        if name not in self._tensors:
            raise unknown_tensor(name, self.folder_or_file)
        return self._tensors[name]
