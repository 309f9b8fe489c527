"""Opens a bundle's graphs as onnxruntime sessions: chooses providers, shares one thread pool, checks the contract."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from shortstack.cores import usable_cores
from shortstack.graphs import names
from shortstack.graphs.arguments import expect, is_whole
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.contract import GraphContract, Port, PortType, check_ports
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.packing import LEAST_ONNXRUNTIME, can_pack
from shortstack.threads import describe_threads, make_thread_pool, session_options, use_own_pools

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
_SHORT_NAMES = {"cpu": CPU, "cuda": "CUDAExecutionProvider", "tensorrt-rtx": "NvTensorRTRTXExecutionProvider"}
_NOT_USABLE = {
    "TensorrtExecutionProvider": "TensorRT does not have its attention operator",
    "AzureExecutionProvider": "it sends models elsewhere",
}
_COPY_AGAIN = "copy the bundle again as a whole, or re-export it"
_PORT_TYPES: dict[str, PortType] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
}


@dataclass(frozen=True, slots=True)
class Device:
    """Where a session's cache lives.

    Attributes:
        kind: onnxruntime's device name: ``cpu`` or ``cuda``.
        index: The number of the device among those of its kind.
    """

    kind: str = "cpu"
    index: int = 0

    @property
    def is_host(self) -> bool:
        """Whether graphs read and write numpy arrays directly, without copies."""
        return self.kind == "cpu"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where some of the segments compute.

    Attributes:
        providers: Execution providers in order of preference: ``cpu``, ``cuda``, or onnxruntime's names.
        threads: Size of a thread pool for these segments alone. The other segments then get the remaining cores, and
            the process has no common pool. None shares the process's pool. A shared pool of one thread suits a
            pipeline too, since each segment then runs on the thread that calls it.
    """

    providers: tuple[str, ...] = ("cpu",)
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_providers(self.providers)
        expect(self.threads is None or is_whole(self.threads, 1), "threads", self.threads, "a whole number, 1 or more")


def resolve_providers(providers: Sequence[str] | None) -> list[str]:
    """Return onnxruntime's names for the wanted providers, in order, with the CPU as the last resort.

    Raises:
        RequestError: A provider is unknown, or the installed onnxruntime does not have it.
    """
    _check_providers(providers)
    if isinstance(providers, str):
        providers = [providers]
    available: list[str] = ort.get_available_providers()
    resolved = [_SHORT_NAMES.get(name.lower(), name) for name in providers or [CPU]]
    for asked, name in zip(providers or [CPU], resolved, strict=True):
        if name in _NOT_USABLE:
            why = _NOT_USABLE[name]
            raise RequestError(f"provider {asked!r} cannot run a bundle: {why}", remedy="choose cpu or cuda")
        if name not in available:
            usable = [provider for provider in available if provider not in _NOT_USABLE]
            raise RequestError(
                f"provider {asked!r} is not in the installed onnxruntime {ort.__version__}",
                expected=f"one of {', '.join(usable)}",
                remedy="choose one of these, or install the onnxruntime package that has it",
            )
    return resolved if CPU in resolved else [*resolved, CPU]


def _check_dtype(bundle: Bundle, provider: str) -> None:
    """Refuse float32 where the attention kernel knows 16-bit floats only; a copy between devices would be as slow."""
    if bundle.manifest.dtype == "float32" and provider.startswith("CUDA"):
        source = bundle.manifest.source_name
        raise RequestError(
            f"{bundle.folder} computes in float32, for which {provider} has no attention kernel",
            expected="a bundle of float16",
            remedy=f"make one with `shortstack export {source} OUT --dtype fp16`, or from a float bundle with "
            "`shortstack quantize BUNDLE OUT --dtype fp16`",
        )


def open_sessions(
    bundle: Bundle,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    upper: Placement | None = None,
    *,
    is_packed: bool = False,
) -> tuple[list[ort.InferenceSession], list[Device]]:
    """Open one session per segment.

    Args:
        bundle: The bundle.
        providers: Execution providers, by onnxruntime's name or ``cpu``, ``cuda``; None takes the CPU.
        threads: Threads of the process's pool. The first load of a process decides; later ones leave it out or repeat
            the number. None: as decided, at first one for each usable core.
        upper: Where all segments but the lowest compute; None: where the lowest does.
        is_packed: Open the graphs in the form of several sequences.

    Returns:
        The sessions, bottom to top, and the device of each one's cache.

    Raises:
        RequestError: A provider is unknown, an argument is of another type, or the process already has a pool with
            another number of threads.
        BundleError: onnxruntime cannot load a graph.
        ContractError: A graph does not match the contract.
    """
    started_s = time.monotonic()
    if is_packed:
        check_packed(bundle)
    expect(upper is None or isinstance(upper, Placement), "upper", upper, "a Placement(...) or None")
    lower_names = resolve_providers(providers)
    upper_names = resolve_providers(upper.providers) if upper is not None else lower_names
    for wanted in (lower_names, upper_names):
        _check_dtype(bundle, wanted[0])
    lower_threads, upper_threads = threads, None
    if upper is not None and upper.threads is not None:
        use_own_pools()
        upper_threads = upper.threads
        lower_threads = threads or max(1, usable_cores() - upper_threads)
    make_thread_pool(threads)
    sessions: list[ort.InferenceSession] = []
    devices: list[Device] = []
    # Top to bottom. To pack a head's weight, a session reads all of it from the file. The top session releases those
    # pages after packing, while the bottom one keeps them for the embedding. In the other order a weight that both use
    # (a tied embedding) would be in memory twice at the peak.
    for segment in reversed(bundle.manifest.plan.segments):
        path = bundle.graph_path(segment, is_packed=is_packed)
        wanted = lower_names if segment.is_first else upper_names
        options = session_options(lower_threads if segment.is_first else upper_threads)
        options.log_severity_level = 3
        graph_started_s = time.monotonic()
        session = open_graph(path, options, wanted, bundle.manifest.contract(segment, is_packed=is_packed))
        sessions.insert(0, session)
        devices.insert(0, Device("cuda" if wanted[0].startswith(("CUDA", "NvTensorRT")) else "cpu"))
        log.debug("%s opened on %s in %.2f s", path.name, wanted[0], time.monotonic() - graph_started_s)
    log.info(
        "%s opened in %.2f s: %d graphs on %s, threads: %s",
        bundle.folder,
        time.monotonic() - started_s,
        len(sessions),
        lower_names[0] if upper_names == lower_names else f"{lower_names[0]}, the upper ones on {upper_names[0]}",
        describe_threads(lower_threads, upper_threads),
    )
    return sessions, devices


def open_graph(
    path: Path, options: ort.SessionOptions, providers: list[str], contract: GraphContract
) -> ort.InferenceSession:
    """Open one graph and compare it with its contract; errors as in :func:`open_sessions`."""
    session = _open(path, options, providers)
    check_ports(str(path), _contract(path, session), contract)
    return session


def check_packed(bundle: Bundle) -> None:
    """Check that a bundle can run several sequences at once here.

    Raises:
        RequestError: It has no graphs for that, or onnxruntime is too old for them.
    """
    spec = bundle.manifest.spec
    if not can_pack(spec):
        raise RequestError(
            f"{bundle.folder} runs one sequence at a time",
            found="layers that use keys and values of layers above them, or do not see their own position",
            remedy="load it with slots=1",
        )
    if not bundle.manifest.has_packed_form:
        raise RequestError(
            f"{bundle.folder} has no graphs for several sequences: an older version of shortstack wrote it",
            expected=f"files such as {names.packed_file(0, bundle.manifest.plan.segments[0].end)}",
            remedy="export it again, or load it with slots=1",
        )
    found = tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:2])
    if found < LEAST_ONNXRUNTIME:
        raise RequestError(
            "several sequences at once need a newer onnxruntime",
            found=ort.__version__,
            expected=f"{'.'.join(map(str, LEAST_ONNXRUNTIME))} or later",
            remedy="upgrade onnxruntime, or load the bundle with slots=1",
        )


def _open(path: Path, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
    """Open one graph. onnxruntime's own fallback to the CPU is off: it prints to stdout, which belongs to results.

    Raises:
        RequestError: The first provider does not start.
        BundleError: The graph cannot be loaded.
    """
    try:
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except Exception as error:
        if providers != [CPU]:
            _open(path, options, [CPU])  # where the CPU cannot load it either, the graph is to blame
            raise _does_not_start(providers[0], one_line(error)) from None
        raise BundleError(
            f"{path} cannot be loaded by onnxruntime {ort.__version__}: {one_line(error)}",
            remedy=_COPY_AGAIN,
        ) from None
    if session.get_providers()[0] != providers[0]:  # a provider whose libraries are missing is left out with a warning
        raise _does_not_start(providers[0], ", ".join(session.get_providers()))
    return session


def _does_not_start(provider: str, found: str) -> RequestError:
    return RequestError(
        f"provider {provider} does not start on this machine",
        found=found,
        remedy="check its driver and libraries, or choose another provider",
    )


def one_line(error: Exception) -> str:
    """Return the beginning of what onnxruntime says of an error, on one line."""
    said = str(error)
    if isinstance(error, UnicodeDecodeError):  # it quotes a name of the graph that is not text
        said = error.object.decode("utf-8", "replace")
    return re.sub(r"\s+", " ", said).strip()[:300] or type(error).__name__


def _check_providers(providers: object) -> None:
    given = (providers,) if isinstance(providers, str) else providers
    is_right = given is None or (isinstance(given, Sequence) and all(isinstance(name, str) for name in given))
    expect(is_right, "providers", providers, 'a list of names such as ["cuda", "cpu"]')


def _contract(path: Path, session: ort.InferenceSession) -> GraphContract:
    try:
        return GraphContract(_ports(session.get_inputs()), _ports(session.get_outputs()))
    except UnicodeDecodeError as error:
        raise BundleError(
            f"{path}: the name of an input, an output or a dimension is not text",
            found=repr(bytes(error.object)),
            expected="UTF-8",
            remedy=_COPY_AGAIN,
        ) from None


def _ports(arguments: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(Port(a.name, _PORT_TYPES.get(a.type, a.type), tuple(a.shape)) for a in arguments)
