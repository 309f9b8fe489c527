"""One text through a bundle whose exits see more than the residual stream: its tokens, and the states before them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.runtime.model import Model
from shortstack.runtime.teach import Teacher, teach


def teach_exits(model: Model, tokens: Sequence[int]) -> Teacher:
    """Return what :func:`teach` does; exits that see states are fed the model's own, as the first draft of a round is.

    Args:
        model: The bundle.
        tokens: The text. Its first token has no state before it, and is fed zeros.
    """
    manifest = model.bundle.manifest
    states = np.zeros((1, len(tokens), manifest.spec.hidden_size), manifest.dtype)
    if manifest.plan.has_state:
        final = np.empty_like(states)
        _teach(model, tokens, states, {names.FINAL_STATE: final})
        states[:, 1:] = final[:, :-1]
    return _teach(model, tokens, states, {})


def _teach(model: Model, tokens: Sequence[int], states: np.ndarray, fetched: Mapping[str, np.ndarray]) -> Teacher:
    """Run one text with inputs and outputs bound that :func:`teach` does not know of."""
    inputs = {names.INPUT_IDS: np.asarray([tokens], dtype=np.int64), names.EXIT_STATE: states}
    fed = copy.copy(model)
    fed.sessions = []
    for segment, session in zip(model.bundle.manifest.plan.segments, model.sessions, strict=True):
        contract = model.bundle.manifest.contract(segment)
        more_inputs = {port.name: inputs[port.name] for port in contract.inputs[1:] if port.name in inputs}
        more_outputs = {port.name: fetched[port.name] for port in contract.outputs if port.name in fetched}
        fed.sessions.append(_FedSession(session, more_inputs, more_outputs))
    return teach(fed, tokens)


class _FedSession:
    """A session with inputs and outputs that its caller does not know of.

    Args:
        session: The session.
        inputs: Those inputs, by name.
        outputs: Where those outputs are written, by name.
    """

    def __init__(
        self, session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
    ) -> None:
        self._session = session
        self._inputs = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        self._outputs = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in outputs.items()}
        self._keep = inputs, outputs  # OrtValues over numpy memory do not own it
        self.run_with_iobinding = session.run_with_iobinding

    def io_binding(self) -> Any:
        """Return a binding of the session with those tensors bound."""
        binding = self._session.io_binding()
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            binding.bind_ortvalue_output(name, value)
        return binding
