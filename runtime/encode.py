"""From a prompt of any kind to token ids that a bundle can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shortstack.graphs.errors import RequestError
from shortstack.graphs.manifest import Manifest
from shortstack.runtime.request import Prompt, prompt_items
from shortstack.runtime.text.tokenizer import Tokenizer


class PromptEncoder:
    """Encodes prompts for one bundle.

    Args:
        manifest: What the bundle holds.
        tokenizer: Its tokenizer.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self._manifest = manifest
        self._tokenizer = tokenizer

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """See :meth:`shortstack.runtime.model.Model.encode`."""
        items = prompt_items(prompt)
        if items is None:
            ids = self._tokenizer.encode(str(prompt))
        elif items and isinstance(items[0], Mapping):
            ids = self._tokenizer.encode_chat(items, tools=tools, variables=template_variables)
        else:
            ids = [int(item) for item in items]
        self.check_ids(ids)
        max_length = self._manifest.max_length
        if len(ids) >= max_length:
            raise RequestError(
                "the prompt is too long for this bundle",
                found=f"{len(ids)} tokens",
                expected=f"fewer than {max_length}, to leave room for at least one new token",
                remedy="shorten the prompt, or export with a larger --max-length",
            )
        return ids

    def check_ids(self, ids: Sequence[int]) -> None:
        """Check the token ids of a prompt; errors as in :meth:`encode`."""
        if not ids:
            raise RequestError("the prompt is empty", remedy="give at least one token")
        self.check_vocabulary("the prompt", ids)

    def check_vocabulary(self, what: str, ids: Sequence[int]) -> None:
        """Refuse token ids outside the vocabulary; ``what`` holds them."""
        vocab_size = self._manifest.spec.vocab_size
        if outside := [token for token in ids if not 0 <= token < vocab_size]:
            raise RequestError(
                f"{what}: a token id outside the vocabulary", found=outside[0], expected=f"0..{vocab_size - 1}"
            )
