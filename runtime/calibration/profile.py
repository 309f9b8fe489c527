"""An exit profile: a JSON file with the threshold found for one task on one bundle, and all that it was found from.

The JSON object has every field of :class:`Profile`, with ``curve`` as a list of objects with the fields of
:class:`Point`, and ``format_version``, 1. A profile is valid only for the weights that it was measured on. Rounding the
weights changes the confidences, so the thresholds of a float model are not valid for a quantized copy of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import RequestError
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.read_file import parse_json_object, read_file
from shortstack.graphs.write_file import write_whole
from shortstack.runtime.calibration.dissimilarity import Loss
from shortstack.runtime.calibration.learn_then_test import Test
from shortstack.runtime.calibration.profile_fields import check_fields
from shortstack.runtime.calibration.template import Template
from shortstack.runtime.early_exit.criteria import Fixed
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy, KVPolicy

PROFILE_FILE = "exit-profile.json"
FORMAT_VERSION = 1
_MOST_BYTES = 1 << 20
_RECALIBRATE = "calibrate again on this bundle: `shortstack calibrate BUNDLE --data prompts.jsonl`"


@dataclass(frozen=True, slots=True)
class Point:
    """The measurements at one threshold.

    Attributes:
        threshold: The threshold.
        mean_loss: Mean of the losses over the prompts.
        p_value: The p-value of the hypothesis "the mean loss is above delta".
        is_accepted: Whether this threshold and all more conservative ones passed.
        mean_exit_layer: Mean depth of the heads that predicted the tokens.
        exited_share: Share of tokens that left early.
        tokens: Tokens generated.
        tokens_per_s: Decoding speed on the machine of the calibration, for information; None if nothing was timed.
    """

    threshold: float
    mean_loss: float
    p_value: float
    is_accepted: bool
    mean_exit_layer: float
    exited_share: float
    tokens: int
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """The result of a calibration.

    Attributes:
        name: The task.
        template: The criterion, with ``{}`` in place of the threshold.
        threshold: The boldest threshold that passed; None if none did.
        criterion: The criterion with that threshold; ``never`` if none passed.
        exit_layers: The exits in use, ascending.
        delta: Bound on the mean loss.
        epsilon: The bound fails with at most this probability, over the draw of the prompts.
        prompts: How many prompts were used.
        loss: The loss that is bounded.
        test: The statistical test.
        max_new_tokens: The most tokens per answer.
        mean_loss: Mean loss at the threshold; 0 if none passed.
        mean_exit_layer: Mean depth of the heads that predicted the tokens, at the threshold.
        exited_share: Share of tokens that left early, at the threshold.
        predicted_saving: 1 - mean_exit_layer / layers: the share of the layers that tokens did not wait for. The time
            saved is about this share if filling caches later costs next to nothing, and less otherwise.
        grid: All thresholds that the calibration could try, most conservative first.
        weights_sha256: Identifies the bundle's weights.
        precision: How the bundle stores weights and cache, in words.
        shortstack: The shortstack version that measured it.
        curve: The measurements, in the order of the grid.
    """

    name: str
    template: str
    threshold: float | None
    criterion: str
    exit_layers: tuple[int, ...]
    delta: float
    epsilon: float
    prompts: int
    loss: Loss
    test: Test
    max_new_tokens: int
    mean_loss: float
    mean_exit_layer: float
    exited_share: float
    predicted_saving: float
    grid: tuple[float, ...]
    weights_sha256: str
    precision: str
    shortstack: str
    curve: tuple[Point, ...]

    def policy(self, kv_policy: KVPolicy = "flush") -> ExitPolicy:
        """Return the calibrated exit policy. Any ``kv_policy`` is allowed, since it does not change the output."""
        return ExitPolicy(parse_criterion(self.criterion), self.exit_layers, kv_policy=kv_policy)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        fields = asdict(self)
        lists = {name: list(fields[name]) for name in ("exit_layers", "grid", "curve")}
        return {"format_version": FORMAT_VERSION, **fields, **lists}


def precision_words(manifest: Manifest) -> str:
    """Return how a bundle stores weights and cache: ``float32`` or ``float32; int4, blocks of 32; KV cache int8``."""
    formats = sorted({str(wanted) for wanted in manifest.precision.weights.values()})
    cache = [] if manifest.precision.kv_cache == "float" else [f"KV cache {manifest.precision.kv_cache}"]
    return "; ".join([manifest.dtype, *formats, *cache])


def write_profile(profile: Profile, path: Path, *, follow_links: bool = True) -> None:
    """Write a profile as a whole or not at all.

    Args:
        profile: The profile.
        path: The file.
        follow_links: Write through a link. Otherwise it is replaced: in a bundle it leads to the hub's cache, or out.

    Raises:
        RequestError: The file cannot be written.
    """
    content = (json.dumps(profile.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
    if path.is_symlink() and not follow_links:
        path.unlink()
    write_whole(path, content, RequestError, f"--out {path}")


def read_profile(path: str | Path) -> Profile:
    """Read and check a profile, without comparing it with a bundle.

    Raises:
        RequestError: The file cannot be read, or fields are missing, unknown or wrong; the message names all of them.
    """
    path = Path(path)
    content = read_file(path, RequestError, _RECALIBRATE, limit=_MOST_BYTES)
    data = parse_json_object(content, f"exit profile {path}", RequestError, _RECALIBRATE)
    version = data.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise RequestError(
            f"exit profile {path}: field format_version",
            found=repr(version)[:60],
            expected=FORMAT_VERSION,
            remedy="calibrate again, or install the shortstack version that wrote it",
        )
    if problems := check_fields(data):
        raise RequestError(f"exit profile {path}: {'; '.join(problems)}", remedy=_RECALIBRATE)
    points = tuple(Point(**point) for point in data["curve"])
    tuples = {name: tuple(data[name]) for name in ("exit_layers", "grid")}
    profile = Profile(**{**data, **tuples, "curve": points})
    try:
        template = Template(profile.template)
        criterion = Fixed(always=False) if profile.threshold is None else template.at(profile.threshold)
    except RequestError as error:
        raise RequestError(f"exit profile {path}: {error}") from None
    if profile.criterion != str(criterion):
        raise RequestError(
            f"exit profile {path}: field criterion is not the template with the threshold, so the file was edited",
            found=repr(profile.criterion),
            expected=repr(str(criterion)),
            remedy=_RECALIBRATE,
        )
    return profile


def load_profile(path: str | Path, bundle: Bundle) -> Profile:
    """Read a profile for use with a bundle.

    Raises:
        RequestError: See :func:`read_profile`; or the profile was measured on other weights, at another precision, or
            with exits that the bundle lacks.
    """
    profile = read_profile(path)
    manifest = bundle.manifest
    if profile.weights_sha256 != manifest.weights_sha256:
        raise RequestError(
            f"exit profile {path} was measured on other weights than those of {bundle.folder}",
            found=f"{profile.weights_sha256} ({profile.precision})",
            expected=f"{manifest.weights_sha256} ({precision_words(manifest)})",
            remedy=_RECALIBRATE,
        )
    if profile.precision != precision_words(manifest):
        raise RequestError(
            f"exit profile {path} was measured at another precision than that of {bundle.folder}",
            found=profile.precision,
            expected=precision_words(manifest),
            remedy=_RECALIBRATE,
        )
    try:
        profile.policy().exits_in(manifest.plan)
    except RequestError as error:
        raise RequestError(f"exit profile {path} does not fit {bundle.folder}: {error}") from None
    return profile
