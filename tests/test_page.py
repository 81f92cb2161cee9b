"""The page in a real browser: captions, controls, a dropped file; nothing but text, for everybody, in two languages."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, Page, chromium, drop, expect, fresh_page, violations
from bundled import recording, sound_of, transcripts, write_wav
from mosquitto import PATIENCE_S, wait_for
from playwright.sync_api import Locator
from speech_server import Serving, serving
from test_access import TOKEN
from test_captions import said

from edge_asr.serve.access import hash_of
from edge_asr.types import SAMPLE_RATE, Partial, SegmentId

TEXTS = transcripts()
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
WIDE: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
XSS = '<img src=x onerror="document.title=1"><script>document.title=2</script>&lt;b&gt;'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, state_folder: Path) -> Path:
    """Return a state folder of one's own: mute and preset outlive a restart."""
    folder = tmp_path_factory.mktemp("state")
    (folder / "engines").symlink_to(state_folder / "engines")
    return folder


@pytest.fixture(scope="module")
def server(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Serve with a source that says nothing, in push-to-talk mode."""
    silence = write_wav(tmp_path_factory.mktemp("sound") / "silence.wav", np.zeros(1800 * SAMPLE_RATE, np.float32))
    source = {"kind": "file", "path": silence, "name": "desk"}
    limits = {"requests_per_minute": 100_000}
    with serving(state_dir=own, sources=[source], listen={"mode": "push_to_talk"}, http={"limits": limits}) as one:
        wait_for(lambda: one.daemon.describe()["state"] == "ready", "the model")
        yield one


def opened(page: Page, server: Serving) -> Page:
    page.goto(server.url)
    expect(page.locator("#state-name")).to_have_attribute("data-state", "ready")
    return page


def wait_for_page(page: Page, condition: Callable[[], object]) -> None:
    """Return as soon as the condition holds; the page goes on meanwhile."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at
        page.wait_for_timeout(5)


def finals(page: Page) -> Locator:
    return page.locator("#finals .text")


def test_what_is_spoken_appears_as_it_is_spoken(browser: Browser, own: Path, tmp_path: Path) -> None:
    names = ("01.wav", "03.wav")
    gap = np.zeros(2 * SAMPLE_RATE, np.float32)
    sound = np.concatenate([gap, *(part for name in names for part in (sound_of(name), gap))])
    source = {"kind": "file", "path": write_wav(tmp_path / "tape.wav", sound), "name": "desk"}
    with serving(state_dir=own, sources=[source]) as server, fresh_page(browser) as page:
        page.goto(server.url)
        level = page.locator('meter[data-source="desk"]')
        expect(level).to_have_attribute("aria-label", "Level of desk")
        wait_for_page(page, lambda: page.evaluate("document.querySelector('meter').value") > -25)
        expect(page.locator("#partials .text")).to_have_text(re.compile("."))
        expect(finals(page)).to_have_text([TEXTS[name] for name in names])
        expect(page.locator("#partials .text")).to_have_count(0)
        expect(page.locator("#summary")).to_contain_text("2 sentences: response p50 ")
        expect(page.locator("#picture svg")).to_have_attribute("aria-label", re.compile("0 later than 300 ms"))
        assert page.locator("#picture rect.pause").count() >= 2
        assert page.locator("#picture line.line").count() == 1
        assert page.locator("#stages th[scope=row]").all_text_contents()[0] == "waiting for the pause"
        page.reload()
        expect(page.locator("#summary")).to_contain_text("2 sentences")
        expect(finals(page)).to_have_count(0)


def test_a_partial_gives_way_to_its_final_or_is_taken_back(browser: Browser, server: Serving) -> None:
    shown = server.server.captions
    with fresh_page(browser) as page:
        opened(page, server)
        for text in ("打", "打开客厅"):
            shown.offer_partial(Partial(said(1).id, "desk", text, "", None))
        expect(page.locator("#partials .text")).to_have_text(["打开客厅"])
        assert page.evaluate("getComputedStyle(document.querySelector('#partials .text')).color") != page.evaluate(
            "getComputedStyle(document.body).color"
        ), "it is not certain yet"
        shown.offer_partial(Partial(SegmentId("2"), "desk", "嗯", "", None))
        shown.offer_partial(Partial(SegmentId("2"), "desk", "", "", None, end=True))
        shown.offer(said(1, "打开客厅灯"))
        expect(finals(page)).to_have_text(["打开客厅灯"])
        expect(page.locator("#partials .text")).to_have_count(0)


def test_what_is_said_is_never_more_than_text(browser: Browser, server: Serving) -> None:
    with fresh_page(browser, may_complain_of="Content Security Policy") as page:
        opened(page, server)
        server.server.captions.offer_partial(Partial(SegmentId("3"), XSS, XSS, "", None))
        expect(page.locator("#partials .text")).to_have_text([XSS])
        server.server.captions.offer(said(4, XSS))
        expect(finals(page)).to_have_text([XSS])
        assert page.locator("#captions img, #captions script, #captions b").count() == 0
        assert page.title() == "hall · edge_asr"
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'x = 1'}))")
        assert page.evaluate("typeof x") == "undefined", "the policy allows no such script, whoever writes it"


def test_the_controls_change_the_appliance_and_follow_it(browser: Browser, server: Serving) -> None:
    with fresh_page(browser, may_complain_of="409 (Conflict)") as page, fresh_page(browser) as other:
        for one in (page, other):
            opened(one, server)
        page.get_by_role("button", name="Mute").click()
        for one in (page, other):
            expect(one.locator("#mute")).to_have_attribute("aria-pressed", "true")
        assert server.daemon.describe()["mute"] is True
        expect(page.locator("#health dd").first).to_have_text("muted")
        page.locator("#talk").click()
        expect(page.get_by_role("alert")).to_contain_text("muted; send off")
        other.locator("#mute").press("Enter")
        expect(page.locator("#mute")).to_have_attribute("aria-pressed", "false")
        other.get_by_label("A sentence ends after").select_option("aggressive")
        expect(page.locator("#preset")).to_have_value("aggressive")
        assert server.daemon.describe()["preset"] == "aggressive"


def listened(server: Serving) -> bool:
    """Tell whether what begins now is heard."""
    attention = server.daemon._attention
    return attention.hears(attention._clock())


def test_push_to_talk_listens_while_it_is_held_or_for_a_while(browser: Browser, server: Serving) -> None:
    with fresh_page(browser) as page:
        opened(page, server)
        talk = page.locator("#talk")
        talk.hover()
        page.mouse.down()
        wait_for_page(page, lambda: listened(server))
        expect(talk).to_have_text("Listening…")
        page.wait_for_timeout(600)  # as long as it takes to be no tap
        page.mouse.up()
        wait_for_page(page, lambda: not listened(server))
        expect(talk).to_have_text("Push to talk")
        talk.focus()
        page.keyboard.press("Space")
        wait_for_page(page, lambda: listened(server))
        expect(talk).to_have_text("Listening…")


@pytest.mark.parametrize("way", ["dropped", "chosen"])
def test_a_file_becomes_text_with_times_and_subtitles(
    way: str, browser: Browser, server: Serving, tmp_path: Path
) -> None:
    with fresh_page(browser, accept_downloads=True) as page:
        opened(page, server)
        if way == "dropped":
            drop(page, "#drop", recording("01.wav"))
        else:
            page.set_input_files("#file", recording("01.wav"))
        result = page.locator("#result")
        expect(result).to_contain_text("01.wav: ")
        expect(result.locator("li span:last-child")).to_have_text([TEXTS["01.wav"]])
        expect(result.locator("li .meta")).to_have_text([re.compile(r"00:00:0\d\.\d{3} – 00:00:0\d\.\d{3}")])
        for label, name in (("SRT", "srt"), ("WebVTT", "vtt"), ("Text", "txt")):
            with page.expect_download() as download:
                result.get_by_role("link", name=label).click()
            assert download.value.suggested_filename == f"01.{name}"
            download.value.save_as(tmp_path / name)
            assert TEXTS["01.wav"] in (tmp_path / name).read_text(encoding="utf-8")
        assert re.match(r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n", (tmp_path / "srt").read_text(encoding="utf-8"))
        assert (tmp_path / "vtt").read_text(encoding="utf-8").startswith("WEBVTT\n\n00:00:0")
        assert violations(page) == []


def test_what_is_no_sound_is_told(browser: Browser, server: Serving, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("no sound")
    with fresh_page(browser, may_complain_of="400 (Bad Request)") as page:
        opened(page, server)
        drop(page, "#drop", tmp_path / "letter.txt", "text/plain")
        expect(page.locator("#result .late")).to_contain_text("not audio of any known format")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("locale", "title"), [("en-GB", "What is said"), ("zh-CN", "实时字幕")])
@pytest.mark.parametrize("screen", [PHONE, WIDE], ids=["phone", "wide"])
def test_everybody_can_use_it(
    scheme: str, locale: str, title: str, screen: dict[str, Any], browser: Browser, server: Serving
) -> None:
    with fresh_page(browser, color_scheme=scheme, locale=locale, **screen) as page:
        opened(page, server)
        for number in range(3):
            server.server.captions.offer(said(number))
        server.server.captions.offer_partial(Partial(SegmentId("9"), "desk", "打开", "", None))
        expect(finals(page)).to_have_count(3)
        assert violations(page) == []
        expect(page.locator("#said-title")).to_have_text(title)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is to be pushed aside"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 19)"
        assert dark == (scheme == "dark")
        page.locator("#theme").click()
        page.locator("#language").click()
        assert violations(page) == []
        expect(page.locator("#said-title")).not_to_have_text(title)
        page.reload()
        expect(page.locator("#said-title")).not_to_have_text(title)


def test_all_of_it_can_be_reached_by_keyboard(browser: Browser, server: Serving) -> None:
    with fresh_page(browser, **WIDE) as page:
        opened(page, server)
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        wanted = ["skip", "language", "theme", "captions", "mute", "talk", "preset", "file"]
        assert reached[: len(wanted)] == wanted


def test_a_page_asks_for_the_token_once_and_comes_back_by_itself(browser: Browser, own: Path) -> None:
    keys: dict[str, Any] = {"tokens": [hash_of(TOKEN)]}
    with fresh_page(browser, may_complain_of="") as page:
        with serving(state_dir=own, http=keys) as server:
            wait_for(lambda: server.service.ready, "the model")
            page.goto(server.url)
            expect(page).to_have_url(f"{server.url}/login")
            assert violations(page) == []
            page.get_by_label("Token").fill("wrong")
            page.get_by_role("button").click()
            expect(page.get_by_role("alert")).to_contain_text("Wrong token")
            page.get_by_label("Token").fill(TOKEN)
            page.get_by_role("button").click()
            expect(page.locator("#state-name")).to_have_attribute("data-state", "ready")
            page.get_by_role("button", name="Log out").click()
            expect(page).to_have_url(f"{server.url}/login")
            page.get_by_label("Token").fill(TOKEN)
            page.get_by_role("button").click()
            expect(page.locator("#state-name")).to_have_attribute("data-state", "ready")
            port = server.port
        expect(page.locator("#state-name")).to_have_attribute("data-state", "away")
        expect(page.locator("#mute")).to_be_disabled()
        with serving(state_dir=own, http={**keys, "port": port}):  # where nobody is logged in any more
            expect(page).to_have_url(re.compile("/login$"))
