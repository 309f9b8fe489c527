"""The page of `shortstack inspect --html`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.browser import Browser, find_browser
from helpers.inspect_bundles import MakeBundle, Page, report_of, tiny_spec
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.spec import ModelSpec
from shortstack.runtime.commands.inspect_bundle import inspect
from shortstack.runtime.inspection.page import render_html, write_html


@pytest.mark.parametrize(
    ("spec", "exits"),
    [
        (tiny_spec(2), ()),
        (tiny_spec(), (ExitSpec(1, 25), ExitSpec(2, 3), ExitSpec(3))),
        (tiny_spec(12, tied=False, kv_map=(0, 1, 1, 1, 4, 5, 4, 5, 4, 5, 0, 0)), (ExitSpec(6),)),
        (tiny_spec(6, kv_map=(0, 4, 4, 4, 4, 5)), (ExitSpec(3),)),  # consumers below their producer
        (tiny_spec(90), (ExitSpec(1), ExitSpec(2, 10))),
    ],
    ids=["uncut", "three exits", "shared KV", "shared from above", "deep"],
)
def test_the_page_is_well_formed_and_loads_nothing(
    spec: ModelSpec, exits: tuple[ExitSpec, ...], make_bundle: MakeBundle
) -> None:
    html = render_html(report_of(make_bundle(spec, *exits)))
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href"} & {name for name, _ in page.attributes}
    assert not [marker for marker in ("http:", "https:", "src=", "@import", "//") if marker in html.lower()]
    assert html.lower().count("url(") == html.count("url(#") == 1  # the hatching of a tied head
    assert page.tags.count("svg") == 1
    for exit_spec in exits:
        assert f"exit after {exit_spec.exit_layer}" in " ".join(page.text)


@pytest.mark.parametrize(
    ("vocab", "tied", "words", "absent"),
    [
        (4000, True, ("a block with a zigzag is cut short", "read from the embedding, stored once"), ()),
        (100, False, (), ("zigzag", "stored once")),
    ],
    ids=["high and tied", "to scale and untied"],
)
def test_the_legend_names_what_is_drawn_and_nothing_else(
    vocab: int, tied: bool, words: tuple[str, ...], absent: tuple[str, ...], make_bundle: MakeBundle
) -> None:
    spec = replace(tiny_spec(tied=tied), vocab_size=vocab)
    text = " ".join(Page(render_html(report_of(make_bundle(spec)))).text)
    assert "In the column, area follows bytes" in text
    assert "MLP and norms" in text
    assert [word for word in (*words, *absent) if word in text] == list(words)
    assert "exit head" not in text
    assert "lines lead to" not in text


def test_the_page_escapes_a_hostile_source_name(make_bundle: MakeBundle) -> None:
    hostile = "</title><script>alert('x')</script>\"><img src=x onerror=y>"
    html = render_html(report_of(make_bundle(tiny_spec(), source=hostile)))
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "<script" not in html
    assert hostile in "".join(page.text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_and_its_narrow_tables_without_overflow(
    width: int, scheme: str, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    path = find_browser()
    if path is None:
        pytest.skip("no browser: set SHORTSTACK_BROWSER, or `make browser`")
    page = tmp_path / "page.html"
    write_html(report_of(make_bundle(tiny_spec(kv_map=(0, 1, 1, 1)), ExitSpec(1, 25), ExitSpec(2))), page)
    with Browser(path) as browser:
        browser.open(page, width, scheme)
        assert browser.run("document.documentElement.scrollWidth") <= width
        for table in ("exits", "files"):
            box = f"document.querySelector('table.{table}').closest('.scroll')"
            assert browser.run(f"{box}.scrollWidth") <= browser.run(f"{box}.clientWidth")
        assert browser.requests == [page.as_uri()]
        assert browser.messages == []


def test_the_page_is_written_whole_or_not_at_all(make_bundle: MakeBundle, tmp_path: Path) -> None:
    folder = make_bundle(tiny_spec(), ExitSpec(2))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(inspect, [str(folder), "--html", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    assert str(page) in done.stderr
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    with pytest.raises(RequestError, match="cannot be written"):
        write_html(report_of(folder), tmp_path / "missing" / "page.html")
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(RequestError, match="cannot be written"):
        write_html(report_of(folder), taken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "page.html", "taken"]
