"""Options of Megatron checkpoints that are not what their names promise."""

from __future__ import annotations

import argparse

import pytest
import torch

from shortstack.export.checkpoint.megatron_config import hugging_face_config, read_args
from shortstack.graphs.errors import UnsupportedError


@pytest.mark.parametrize("version", [torch.zeros(2), {"a": 1}, argparse.Namespace(), None])
def test_a_version_of_another_type_is_named(version: object) -> None:
    with pytest.raises(UnsupportedError, match="checkpoint_version = "):
        hugging_face_config(read_args({}, "model_optim_rng.pt"), version)
