"""The repository's Markdown pages: their links, their anchors as GitHub makes them, their code blocks and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\s*$")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*$")
_LINK = re.compile(r"(?<!\!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)\)|!\[[^\]]*\]\(([^()\s]+)\)")
_ANCHOR = re.compile(r'<a (?:id|name)="([^"]+)">')
_CODE = re.compile(r"`[^`]*`")
_ANSI_C = re.compile(r"\$'((?:[^'\\]|\\.)*)'")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page: its language (empty: none), its text, and the line of the page that it starts on."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def blocks(self) -> list[Block]:
        found, language, start, lines = [], None, 0, list[str]()
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            fence = _FENCE.match(line)
            if fence is None:
                lines.append(line)
            elif language is None:
                language, start, lines = fence.group(1), number + 1, []
            else:
                found.append(Block(language, "\n".join(lines), start))
                language = None
        assert language is None, f"{self.path}: a block that starts in line {start} does not end"
        return found

    @property
    def prose(self) -> list[str]:
        """The lines outside of fenced blocks."""
        lines, is_code = [], False
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if _FENCE.match(line):
                is_code = not is_code
            elif not is_code:
                lines.append(line)
        return lines

    @property
    def links(self) -> list[str]:
        """What links and images point to."""
        text = _CODE.sub("`code`", "\n".join(self.prose))
        return [target or image for target, image in _LINK.findall(text)]

    @property
    def anchors(self) -> set[str]:
        """The parts of the page that a link may name, as GitHub calls them."""
        found: dict[str, int] = {}
        for line in self.prose:
            if heading := _HEADING.match(line):
                slug = github_slug(heading.group(1))
                count = found.get(slug, -1) + 1
                found[slug] = count
                if count:
                    found[f"{slug}-{count}"] = 0
        return set(found) | {name for line in self.prose for name in _ANCHOR.findall(line)}

    @property
    def commands(self) -> list[str]:
        """The commands in its shell blocks, and in blocks without a language that show some, each as one line."""
        return [line for block in self.blocks if block.language in ("sh", "") for line in command_lines(block.text)]


def pages(repository: Path) -> list[Page]:
    """The pages that are checked: README.md, docs/, and those of samples/."""
    paths = [repository / "README.md", *(repository / "docs").glob("*.md"), *(repository / "samples").rglob("*.md")]
    return [Page(path) for path in sorted(paths)]


def github_slug(heading: str) -> str:
    """Return the anchor of a heading: lower case, without punctuation, with hyphens for blanks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link, its text
    return re.sub(r"[^\w\- ]", "", text.replace("`", "").lower()).replace(" ", "-")


def command_lines(text: str) -> Iterator[str]:
    """Yield the command lines of a block, lines that end in a backslash joined."""
    for line in text.replace("\\\n", " ").splitlines():
        command = line.strip().removeprefix("$ ")
        if re.match(
            r"(shortstack|python|head|tail|make|optimum-cli|pip|env/bin/\w+) ", command
        ) and not command.startswith("make a "):
            yield command


def split_command(line: str) -> list[str]:
    """Split a command line as bash does: comments left out, ``$'...'`` understood, redirections dropped."""
    plain = _ANSI_C.sub(lambda found: shlex.quote(found.group(1).encode().decode("unicode_escape")), line)
    words = shlex.split(plain, comments=True)
    return words[: words.index(">")] if ">" in words else words
