"""`make demo`: what trained exits do. Commands, parsed by a stack that learnt to draft; a question, for a draft head.

The default model is fetched, cut with the shipped checkpoints and decoded plainly and self-speculatively. Steps that
are done are not redone: the bundles stay in the cache folder, next to the model.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shortstack.graphs.errors import RequestError, ShortstackError
from shortstack.graphs.manifest import FORMAT_VERSION
from shortstack.graphs.names import MANIFEST_FILE
from shortstack.samples.fetch_model import default_model_path

CHECKPOINTS = Path(__file__).with_name("checkpoints")
QUESTION = "Explain how a bicycle stays upright."


@dataclass(frozen=True, slots=True)
class Showing:
    """One bundle and what it is asked.

    Attributes:
        exits: Folder of the exits in samples/checkpoints; also names the bundle.
        adapter: Folder of the adapter, if the model is changed.
        prompts: What to ask.
        options: Of ``generate``.
    """

    exits: str
    adapter: str | None
    prompts: tuple[str, ...]
    options: tuple[str, ...]


SHOWINGS = (
    Showing(
        "smollm2-135m-commands-exit",
        "smollm2-135m-commands",
        ("Play some slow piano music by Erik Satie on Spotify\n", "Will it snow in Tromso on Friday at 9 am\n"),
        ("--raw", "--draft-tokens", "8", "--confidence", "0.5"),
    ),
    Showing("smollm2-135m-draft-head", None, (QUESTION,), ("--draft-tokens", "2", "--bonus", "--confidence", "0.3")),
)


def main(question: str = QUESTION) -> int:
    """Run the demo; returns the exit code of the last command."""
    try:
        gguf = default_model_path()
        for showing in SHOWINGS:
            if not (CHECKPOINTS / showing.exits).is_dir():
                raise RequestError(
                    f"{CHECKPOINTS / showing.exits} is not there: an installed package has no checkpoints",
                    remedy="run `make demo` in a clone of the repository",
                )
    except ShortstackError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for showing in SHOWINGS:
        code = _show(gguf, showing, question)
        if code:
            return code
    return 0


def _show(gguf: Path, showing: Showing, question: str) -> int:
    trained = [CHECKPOINTS / name for name in (showing.adapter, showing.exits) if name is not None]
    weights = b"".join(file.read_bytes() for folder in trained for file in sorted(folder.glob("*.safetensors")))
    bundle = gguf.parent / f"{showing.exits}-f{FORMAT_VERSION}-{hashlib.sha256(weights).hexdigest()[:8]}"
    if not (bundle / MANIFEST_FILE).is_file():
        adapter = () if showing.adapter is None else ("--adapter", str(CHECKPOINTS / showing.adapter))
        code = _run("export", str(gguf), str(bundle), *adapter, "--exits", str(CHECKPOINTS / showing.exits))
        if code:
            return code
    for prompt in showing.prompts:
        code = _run("generate", str(bundle), question if prompt == QUESTION else prompt, "--compare", *showing.options)
        if code:
            return code
    return 0


def _run(*arguments: str) -> int:
    """Run one command in a process of its own, saying first how to run it by hand."""
    print(f"$ shortstack {' '.join(map(_quoted, arguments))}", flush=True)
    return subprocess.run([sys.executable, "-m", "shortstack", *arguments], check=False).returncode


def _quoted(argument: str) -> str:
    """Return an argument as a shell takes it, home and checkout folders shortened."""
    short = argument.replace(str(CHECKPOINTS.parents[1]) + "/", "").replace(str(Path.home()), "~", 1)
    if "\n" in short:
        return "$'" + short.replace("'", "\\'").replace("\n", "\\n") + "'"
    return f"'{short}'" if " " in short else short


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
