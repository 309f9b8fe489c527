"""The page of `generate --report`: what stands on it, that it loads nothing, and how a real browser shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.browser import Browser, find_browser
from shortstack.graphs.errors import RequestError
from shortstack.runtime.calibration.profile import Point, Profile
from shortstack.runtime.commands.agreement import agreement_of
from shortstack.runtime.commands.exit_report import drawing
from shortstack.runtime.commands.exit_report.page import render_page, tip, visible, write_page
from shortstack.runtime.commands.exit_report.report import ExitReport
from shortstack.runtime.commands.exit_report.sweep import SweepPoint, grid_of, sweep, varied_bound, with_threshold
from shortstack.runtime.commands.show import FinishedRun
from shortstack.runtime.commands.show_exits import DepthMarks, bucket_of, count_depths
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.decode.stream import Token
from shortstack.runtime.early_exit.criteria import Criterion
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy

LAYERS, EXITS = 12, (2, 4, 8)
VOID_TAGS = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "</title></script><script>alert('x')</script>\"><img src=x onerror=y>' onmouseover='z"


def tokens_of(*named: tuple[str, int]) -> tuple[Token, ...]:
    return tuple(
        Token(index + 10, text, False, depth, 0.5 + index / 100, index % 3) for index, (text, depth) in enumerate(named)
    )


TOKENS = tokens_of(("The", 12), (" cat", 2), (" sat", 4), ("\n", 8), ("", 2), (" on<b>", 2), (" it.", 12))
PLAIN = (*TOKENS[:3], replace(TOKENS[3], id=99, text=" lay", exit_layer=12), *TOKENS[4:])


def shown(strategy: str, tokens: tuple[Token, ...]) -> FinishedRun:
    stats = Stats(elapsed_s=2.0, first_token_s=1.0)
    for token in tokens:
        stats.count_emitted(token.exit_layer)
    return FinishedRun(strategy, "".join(token.text for token in tokens), tokens, LAYERS, "eos", stats, 0)


POINTS = tuple(
    SweepPoint(threshold, similarity, depth, 0.5, speed, threshold == 0.7)
    for threshold, similarity, depth, speed in ((0.9, 1.0, 10.0, 7.0), (0.7, 0.9, 6.0, 9.0), (0.0, 0.1, 2.0, 20.0))
)


def report(
    tokens: tuple[Token, ...] = TOKENS,
    plain: tuple[Token, ...] = PLAIN,
    *,
    rule: str = "top_prob >= 0.7",
    prompt: str = "Say it.\nNow.",
    points: tuple[SweepPoint, ...] = POINTS,
    profile: Profile | None = None,
    exits: tuple[int, ...] = EXITS,
) -> ExitReport:
    early_tokens, plain_tokens = shown("early-exit", tokens), shown("plain", plain)
    agreement = agreement_of(early_tokens.token_ids, plain_tokens.token_ids)
    policy = ExitPolicy(parse_criterion(rule))
    return ExitReport(
        "tiny", prompt, policy, exits, LAYERS, early_tokens, plain_tokens, 9.0, 6.0, 1.5, 3, agreement, points, profile
    )


class Page(HTMLParser):
    """Parses a page strictly: every tag is closed, in order; gathers the tokens of the first text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID_TAGS:
            self.open.append((tag, dict(attrs)))
        if "data-tip" in dict(attrs):
            self.tokens.append(("", dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if any("data-tip" in attrs for _, attrs in self.open) and self.open[-1][0] != "sub":
            self.tokens[-1] = (self.tokens[-1][0] + data, self.tokens[-1][1])


# The page


def test_every_token_is_there_in_order_with_its_depth() -> None:
    page = Page(render_page(report()))
    assert [text for text, _ in page.tokens] == [token.text for token in TOKENS]
    assert [attrs["data-depth"] for _, attrs in page.tokens] == [str(token.exit_layer) for token in TOKENS]
    colours = [str(attrs["class"]).split()[1] for _, attrs in page.tokens]
    assert colours == ["final", "d0", "d1", "d2", "d0", "d0", "final"]
    assert [attrs["tabindex"] for _, attrs in page.tokens] == ["0"] * len(TOKENS)


def test_a_token_says_what_was_decided_where() -> None:
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


def test_a_calibrated_curve_is_drawn_beside_the_sweep() -> None:
    points = tuple(Point(t, 0.1, 0.01, True, 6.0, 0.5, 100, None) for t in (0.9, 0.8))
    profile = Profile(
        "task", "top_prob >= {}", 0.8, "top_prob >= 0.8", EXITS, 0.1, 0.05, 40, "text", "hoeffding", 64, 0.1, 6.0, 0.5,
        0.5, (0.9, 0.8), "ab" * 32, "float32", "0.0.0", points,
    )  # fmt: skip
    made = report(profile=profile)
    assert [line.css for line in drawing.draw_depth_curve(made).lines].count("calibrated") == 1
    text = Page(render_page(made)).text
    assert "mean text loss at most 0.1 with probability 0.95, over 40 prompts" in text


def test_everything_drawn_lies_within_the_picture() -> None:
    made = report(TOKENS * 50, PLAIN * 50)
    for draw in (drawing.draw_histogram, drawing.draw_depths, drawing.draw_depth_curve, drawing.draw_speed_curve):
        picture = draw(made)
        for rect in picture.rects:
            assert 0 <= rect.x <= rect.x + rect.width <= picture.width
            assert 0 <= rect.y <= rect.y + rect.height <= picture.height + 1e-6
        for label in picture.labels:
            assert 0 <= label.x <= picture.width
            assert 0 < label.y <= picture.height


# What it is made from


def test_agreement_counts_the_prefix_the_positions_and_the_edits() -> None:
    assert agreement_of([1, 2, 3], [1, 2, 3]).is_exact
    found = agreement_of([1, 2, 3, 4], [1, 9, 2, 3, 4])
    assert (found.tokens, found.first_difference, found.equal_share, found.similarity) == (5, 1, 0.2, 0.8)
    assert found.prefix_share == 0.2
    shorter = agreement_of([1, 2], [1, 2, 3, 4])
    assert (shorter.first_difference, shorter.equal_share) == (2, 0.5)
    assert agreement_of([], []).to_json() == {
        "is_exact": True, "tokens": 0, "first_difference": None, "equal_share": 1.0, "similarity": 1.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "measure"),
    [
        ("top_prob >= 0.9", "top_prob"),
        ("margin >= 0.2 ~ 4.0", "margin"),
        ("(entropy <= 1.0 or patience >= 2) and votes >= 2", "entropy"),
        ("top_prob >= 0.9 [4: 0.8]", None),
        ("top_prob >= 0.9 and margin >= 0.2", None),
        ("patience >= 2", None),
        ("always", None),
    ],
)
def test_one_threshold_can_vary(rule: str, measure: str | None) -> None:
    criterion: Criterion = parse_criterion(rule)
    bound = varied_bound(criterion)
    assert (None if bound is None else bound.measure) == measure
    if bound is not None:
        value = bound.threshold.value
        assert str(with_threshold(criterion, value)) == str(criterion)
        assert str(with_threshold(criterion, 0.125)).replace("0.125", repr(value)) == str(criterion)


def test_the_grid_goes_from_cautious_to_bold_and_holds_the_own_threshold() -> None:
    falling, rising = varied_bound(parse_criterion("top_prob >= 0.91")), varied_bound(parse_criterion("entropy <= 1"))
    assert falling is not None
    assert rising is not None
    assert grid_of(falling) == (0.99, 0.95, 0.91, 0.8, 0.7, 0.5, 0.3, 0.0)  # 0.9 is too near
    assert grid_of(rising) == (0.02, 0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0)


def test_without_a_threshold_nothing_is_swept() -> None:
    def run(policy: ExitPolicy) -> None:
        raise AssertionError

    assert sweep(ExitPolicy(parse_criterion("always")), [1], LAYERS, run) == ()  # type: ignore[arg-type]


# The terminal


def test_depths_are_marked_by_colour_or_in_brackets() -> None:
    plain, coloured = DepthMarks(EXITS, LAYERS, False), DepthMarks(EXITS, LAYERS, True)
    assert [plain.mark(t.text, t.exit_layer) for t in TOKENS[:4]] == ["The", " cat[2]", " sat[4]", "[8]\n"]
    assert coloured.mark("The", LAYERS) == "The"
    assert coloured.mark(" cat", 2) == "\x1b[38;5;28m cat\x1b[0m"
    legend = plain.legend(TOKENS).splitlines()
    assert [line.split()[:4] for line in legend] == [
        ["after", "2", "layers", "3"], ["after", "4", "layers", "1"], ["after", "8", "layers", "1"],
        ["all", "12", "layers", "2"],
    ]  # fmt: skip
    assert "42.9%" in legend[0]
    assert "\x1b" not in "".join(legend)


def test_colours_follow_the_order_of_the_exits_however_many_there_are() -> None:
    assert [bucket_of(depth, EXITS) for depth in (*EXITS, LAYERS)] == [0, 1, 2, None]
    many = [bucket_of(depth, range(1, 30)) for depth in range(1, 30)]
    assert many[0] == 0
    assert many[-1] == 5
    assert many == sorted(b for b in many if b is not None)
    assert [(c.depth, c.tokens) for c in count_depths(TOKENS)] == [(2, 3), (4, 1), (8, 1), (12, 2)]


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
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(246, 247, 249)" if scheme == "light" else "rgb(17, 21, 27)")
    assert browser.requests == [page.as_uri()]
    assert browser.messages == []


def test_a_browser_says_of_a_token_what_is_known_by_mouse_and_by_keyboard(browser: Browser, tmp_path: Path) -> None:
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
