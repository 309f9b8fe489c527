r"""Rows of prompt and greedy answer from one model, one at a time; row i is the same whenever it is made.

For :mod:`shortstack.samples.recipes.self_data`. A question that the model asks itself is sampled behind the chat
template's empty user turn::

    <|im_start|>system\n...<|im_end|>\n<|im_start|>user\n        given
    What is the capital of Peru?<|im_end|>                      sampled, seeded by row and attempt
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shortstack.graphs.errors import RequestError
from shortstack.graphs.names import CHAT_TEMPLATE_FILE
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.model import Model
from shortstack.runtime.request import Plain, Speculate, Strategy
from shortstack.runtime.text.tokenizer import Tokenizer

MAX_QUESTION_TOKENS = 128
MAX_ATTEMPTS = 50
_TEMPERATURE, _TOP_P = 1.0, 0.95
_PLACEHOLDER = "PLACEHOLDER-OF-A-USERS-TURN"  # no white space, which templates strip, and nothing that they escape
_INSTEAD = "give --prompts FILE instead of --self-prompted"


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with the model's answer.

    Attributes:
        prompt: Token ids of the prompt.
        answer: Token ids of the answer, the stopping one included.
        kind: ``prompt`` or ``self``.
        tokens: Tokens decoded to make it, questions included, thrown away ones too.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return what is written to the file."""
        return {"p": list(self.prompt), "o": list(self.answer), "k": self.kind}


class Writer:
    """Makes rows with one model.

    Args:
        model: The model.
        max_new_tokens: Longest answer.
        max_prompt_tokens: Longest prompt, chat template included.
        seed: Fixes the questions.
        exit_layer: The exit that drafts; None takes the lowest, if there is one.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_new_tokens: int,
        max_prompt_tokens: int,
        seed: int = 0,
        exit_layer: int | None = None,
    ) -> None:
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._max_prompt_tokens = min(max_prompt_tokens, model.bundle.manifest.max_length - 1)
        self._seed = seed
        # Drafts are adaptive by default: where they lose, decoding is plain but for a probe now and then.
        self._strategy: Strategy = Speculate(exit_layer) if model.exit_layers else Plain()

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of prompts, in the chat template where there is one; too long ones are left out."""
        tokenizer = self._model.tokenizer
        encoded = (
            tokenizer.encode_chat([{"role": "user", "content": prompt}])
            if tokenizer.has_chat_template
            else tokenizer.encode(prompt)
            for prompt in prompts
        )
        return [ids for ids in encoded if 0 < len(ids) <= self._max_prompt_tokens]

    def answer(self, prompt: Sequence[int]) -> Row:
        """Answer a prompt, given as token ids."""
        answer = self._greedy(prompt)
        return Row(tuple(prompt), answer, "prompt", len(answer))

    def ask_and_answer(self, index: int) -> Row:
        """Ask and answer question number ``index``.

        Raises:
            RequestError: The model has no chat template, or writes no usable question in many attempts.
        """
        head, end = empty_user_turn(self._model.tokenizer)
        tokens = 0
        for attempt in range(MAX_ATTEMPTS):
            turn = self._sample(head, end, (self._seed, index, attempt))
            tokens += len(turn)
            prompt = self._prompt_of(turn, end)
            if prompt is not None:
                answer = self._greedy(prompt)
                return Row(prompt, answer, "self", tokens + len(answer))
        raise RequestError(
            f"the model asks itself nothing: {MAX_ATTEMPTS} sampled user turns in a row were empty, garbled or longer "
            f"than {MAX_QUESTION_TOKENS} tokens",
            remedy=_INSTEAD,
        )

    def _sample(self, head: Sequence[int], end: int, seed: tuple[int, int, int]) -> list[int]:
        """Sample a user's turn, its last token included."""
        stream = self._model.stream(
            head,
            max_new_tokens=MAX_QUESTION_TOKENS,
            sampling=SamplingParams(
                temperature=_TEMPERATURE, top_p=_TOP_P, seed=int(np.random.SeedSequence(seed).generate_state(1)[0])
            ),
        )
        for token in stream:
            if token.id == end:
                break
        stream.close()
        return stream.token_ids

    def _prompt_of(self, turn: Sequence[int], end: int) -> tuple[int, ...] | None:
        """Return the prompt of a sampled turn; None if it is not one that a user could have written."""
        tokenizer = self._model.tokenizer
        *question, last = turn
        text = tokenizer.decode(question).strip()
        if last != end or not text or "\ufffd" in text or not tokenizer.special_ids.isdisjoint(question):
            return None
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        return tuple(ids) if len(ids) <= self._max_prompt_tokens else None

    def _greedy(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return self._model.generate(prompt, max_new_tokens=self._max_new_tokens, strategy=self._strategy).tokens


def empty_user_turn(tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Return the ids of a chat up to where the first user begins to write, and the id that ends a user's turn.

    Raises:
        RequestError: There is no chat template, or it marks neither beginning nor end of the user's words.
    """
    text = tokenizer.render_chat([{"role": "user", "content": _PLACEHOLDER}], add_generation_prompt=False)
    head, _, tail = text.partition(_PLACEHOLDER)
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in (head, tail))
    if not before or not after or _PLACEHOLDER in tail:
        raise RequestError(f"{CHAT_TEMPLATE_FILE} does not set a user's words between two marks", remedy=_INSTEAD)
    return before, after[0]
