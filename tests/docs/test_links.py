"""Every link in README, docs and the pages of samples leads somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.documents import Page, github_slug, pages

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", pages(REPOSITORY), ids=lambda page: str(page.path.relative_to(REPOSITORY)))
def test_every_relative_link_and_anchor_exists(page: Page) -> None:
    dead = []
    for link in page.links:
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.path.parent / place).resolve() if place else page.path
        if not target.exists() or REPOSITORY not in (target, *target.parents):
            dead.append(link)
        elif anchor and anchor not in Page(target).anchors:
            dead.append(f"{link} (anchors there: {', '.join(sorted(Page(target).anchors))})")
    assert not dead


def test_every_page_of_docs_is_listed_in_the_index() -> None:
    listed = {link.partition("#")[0] for link in Page(REPOSITORY / "docs" / "README.md").links}
    written = {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    assert written <= listed


def test_the_readme_is_short_and_does_not_promise_what_was_never_run() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "jetson" not in "\n".join(text.splitlines()[:60]).lower()


@pytest.mark.parametrize(
    ("heading", "slug"),
    [
        ("When does it pay?", "when-does-it-pay"),
        ("My export shows no speed-up: why, and what can I do?", "my-export-shows-no-speed-up-why-and-what-can-i-do"),
        ("`shortstack export`", "shortstack-export"),
        ("Float, int8 or int4?", "float-int8-or-int4"),
        ("See [the page](x.md)", "see-the-page"),
    ],
)
def test_anchors_are_those_of_github(heading: str, slug: str) -> None:
    assert github_slug(heading) == slug


def test_links_in_code_are_not_links_and_repeated_headings_are_numbered(tmp_path: Path) -> None:
    page = Page(tmp_path / "page.md")
    page.path.write_text(
        "# A\n\n# A\n\n[x](y.md) `[no](z.md)` ![p](q.png)\n\n```\n[no](w.md)\n# B\n```\n", encoding="utf-8"
    )
    assert page.links == ["y.md", "q.png"]
    assert page.anchors == {"a", "a-1"}
