"""`make demo`: fetch the default model, cut it, and decode one prompt plainly and self-speculatively.

Steps that are done are not redone. The bundle stays in the cache folder, beside the model.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shortstack.graphs.errors import ShortstackError
from shortstack.graphs.manifest import FORMAT_VERSION
from shortstack.graphs.names import MANIFEST_FILE
from shortstack.samples.fetch_model import default_model_path

EXIT_LAYER = 24
DRAFT_VOCAB = 4096
PROMPT = "Explain how a bicycle stays upright."


def main(prompt: str = PROMPT) -> int:
    """Run the demo; returns the exit code of the last command."""
    try:
        gguf = default_model_path()
    except ShortstackError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    bundle = gguf.parent / f"SmolLM2-135M-Instruct-e{EXIT_LAYER}-v{DRAFT_VOCAB}-f{FORMAT_VERSION}"
    if not (bundle / MANIFEST_FILE).is_file():
        cut = ("--exit-layer", str(EXIT_LAYER), "--draft-vocab", str(DRAFT_VOCAB))
        code = _run("export", str(gguf), str(bundle), *cut)
        if code:
            return code
    return _run("generate", str(bundle), prompt, "--compare")


def _run(*arguments: str) -> int:
    """Run one command in a process of its own, saying first how to run it by hand."""
    home = str(Path.home())
    line = " ".join(f"'{a}'" if " " in a else a.replace(home, "~", 1) for a in arguments)
    print(f"$ shortstack {line}", flush=True)
    return subprocess.run([sys.executable, "-m", "shortstack", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
