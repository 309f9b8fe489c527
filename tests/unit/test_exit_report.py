"""The page of `generate --report`: what it shows, that it loads nothing, and how a real browser shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.browser import Browser, find_browser
from helpers.exit_reports import EXITS, HOSTILE, PLAIN, TOKENS, Page, report, tokens_of
from shortstack.graphs.errors import RequestError
from shortstack.runtime.calibration.profile import Point, Profile
from shortstack.runtime.commands.exit_report import drawing
from shortstack.runtime.commands.exit_report.page import (
    render_page,
    tip,
    visible,
    write_page,
)
from shortstack.runtime.commands.exit_report.report import ExitReport

# The page


def test_every_token_is_there_in_order_with_its_depth() -> None:
    page = Page(render_page(report()))
    assert [text for text, _ in page.tokens] == [token.text for token in TOKENS]
    assert [attrs["data-depth"] for _, attrs in page.tokens] == [str(token.exit_layer) for token in TOKENS]
    colours = [str(attrs["class"]).split()[1] for _, attrs in page.tokens]
    assert colours == ["final", "d0", "d1", "d2", "d0", "d0", "final"]
    assert [attrs["tabindex"] for _, attrs in page.tokens] == ["0"] * len(TOKENS)


def test_a_token_shows_what_was_decided_where() -> None:
    made = report()
    said = [tip(made, marked) for marked in made.tokens]
    assert said[1] == "“ cat” after 2 of 12 layers\nconfidence 0.510 · 1 pending\ntoken 1, id 11"
    assert "by the whole model, 12 layers" in said[0]
    assert said[3].endswith("not in the other text")
    assert "no text of its own" in said[4]


@pytest.mark.parametrize(
    "made",
    [
        report(),
        report(plain=TOKENS, points=()),
        report((), (), points=()),
        report(TOKENS[:1], ()),
        report(TOKENS * 200, TOKENS * 199),
        report(tokens_of(*((f"{depth}", depth) for depth in range(1, 13))), exits=tuple(range(1, 12))),
    ],
    ids=["differs", "identical", "empty", "one token", "long", "an exit after every layer"],
)
def test_the_page_is_well_formed_and_loads_nothing(made: ExitReport) -> None:
    html = render_page(made)
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object", "a"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href", "style"} & {name for name, _ in page.attributes}
    assert not [marker for marker in ("http:", "https:", "src=", "@import", "//", "url(") if marker in html.lower()]
    assert ("identical" in page.text) == made.agreement.is_exact
    assert page.tags.count("svg") == (4 if made.sweep else 2)


def test_the_page_escapes_a_hostile_model_prompt_and_name() -> None:
    hostile = tokens_of((HOSTILE, 2), ("\u202e\x1b[31m", 4))
    made = replace(report(hostile, TOKENS, prompt=HOSTILE), source_name=HOSTILE)
    html = render_page(made)
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tokens[0][0] == HOSTILE
    assert HOSTILE in str(page.tokens[0][1]["data-tip"])
    assert page.tokens[1][0] == r"\u202e\x1b[31m"
    assert page.text.count(HOSTILE) >= 4
    assert "\u202e" not in html


def test_text_keeps_tabs_and_joined_letters_and_shows_controls() -> None:
    assert visible("a\tb\u200d\u200cc\r\u2066") == "a\tb\u200d\u200cc\\r\\u2066"


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(report(), page)
    write_page(report(), page)
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    with pytest.raises(RequestError, match=r"--report .* cannot be written"):
        write_page(report(), tmp_path / "missing" / "page.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RequestError, match="cannot be written"):
        write_page(report(), tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "taken"]


def test_a_calibrated_curve_is_drawn_next_to_the_sweep() -> None:
    points = tuple(Point(t, 0.1, 0.01, True, 6.0, 0.5, 100, None) for t in (0.9, 0.8))
    profile = Profile(
        "task", "top_prob >= {}", 0.8, "top_prob >= 0.8", EXITS, 0.1, 0.05, 40, "text", "hoeffding", 64, 0.1, 6.0, 0.5,
        0.5, (0.9, 0.8), "ab" * 32, "float32", "0.0.0", points,
    )  # fmt: skip
    made = report(profile=profile)
    assert [line.css for line in drawing.draw_depth_curve(made).lines].count("calibrated") == 1
    text = Page(render_page(made)).text
    assert "mean text loss at most 0.1 with probability 0.95, over 40 prompts" in text


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("no browser: set SHORTSTACK_BROWSER, or `make browser`")
    with Browser(path) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_without_network_errors_or_overflow(
    browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    page = tmp_path / "page.html"
    hostile = tokens_of((HOSTILE, 2), ("x" * 300, 4), (" end", 12))
    write_page(replace(report((*TOKENS * 30, *hostile), PLAIN * 30, prompt=HOSTILE), source_name=HOSTILE), page)
    browser.requests.clear()
    browser.messages.clear()
    browser.open(page, width, scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('script, img').length") == 0
    for table in ("figures", "sweep"):
        edge = browser.run(f"document.querySelector('table.{table}').getBoundingClientRect().right")
        card = browser.run(f"document.querySelector('table.{table}').closest('section').getBoundingClientRect().right")
        assert edge < card  # the whole table is there without scrolling
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(246, 247, 249)" if scheme == "light" else "rgb(17, 21, 27)")
    assert browser.requests == [page.as_uri()]
    assert browser.messages == []


def test_a_browser_shows_what_is_known_about_a_token_by_mouse_and_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(report(), page)
    browser.open(page, 1200, "light")
    said = "getComputedStyle(document.querySelectorAll('[data-tip]')[{}], '::after').content"
    assert browser.run(said.format(1)) == "none"
    place = browser.run(
        "(() => {const r = document.querySelectorAll('[data-tip]')[1].getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + r.height / 2]})()"
    )
    browser.move_mouse(*place)
    assert "after 2 of 12 layers" in browser.run(said.format(1))
    browser.run("document.querySelectorAll('[data-tip]')[2].focus()")
    assert "after 4 of 12 layers" in browser.run(said.format(2))
    shown_numbers = "[...document.querySelectorAll('[data-tip] sub')].filter(e => e.offsetWidth).length"
    assert browser.run(shown_numbers) == 5
    browser.run("document.getElementById('depths').click()")
    assert browser.run(shown_numbers) == 0
