"""Checks that the runtime loads the text files of a bundle, before the long work of writing it.

Parity aside, this is the only file of the room that opens the runtime: its wing for text, which needs no onnxruntime.
Whether a tokenizer loads is for its one reader to say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from shortstack.graphs import names
from shortstack.graphs.errors import BundleError, CheckpointError
from shortstack.runtime.text.tokenizer import Tokenizer


def check_text_files(source: str, files: Mapping[str, bytes]) -> None:
    """Load the tokenizer as the runtime will.

    Args:
        source: The checkpoint, for messages.
        files: The bundle's text files, content by name.

    Raises:
        CheckpointError: The runtime would refuse them.
    """
    with tempfile.TemporaryDirectory(prefix="shortstack-") as name:
        folder = Path(name)
        for file in names.TEXT_FILES:
            if file in files:
                (folder / file).write_bytes(files[file])
        try:
            Tokenizer.load(folder)
        except BundleError as error:
            raise CheckpointError(
                f"{source} would become a bundle that does not load: {error.problem.replace(f'{folder}/', '')}",
                remedy="mend the file in the checkpoint",
            ) from None
