"""/dashboard: the numbers, and the page that shows them, in a browser."""

import base64
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.browser import Page, find_browser, open_browser
from tests.serving.client import Client, make_client
from tests.serving.process import RANDOM, ROOT, Server, start_server

KEY = "key of the dashboard"
BROWSER = find_browser()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: install Debian's chromium, or Chrome")


def stats(client: Client, **query: Any) -> dict[str, Any]:
    response = client.get("/dashboard/stats", params=query)
    assert response.status_code == 200
    return response.json()


def test_numbers_say_what_was_asked_and_answered(llm: Any) -> None:
    from pjengine.stats import read_stats

    client = make_client(llm)
    recent = client.service.metrics.recent
    recent.sample(read_stats(llm.engine))
    before = stats(client)
    assert before["ttft_s"]["count"] == before["tpot_s"]["count"] == 0 and before["samples"] == []
    body = {"prompt": "import os\n" * 20, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    client.answer("/v1/completions", **body)
    client.events("/v1/completions", **body)
    client.answer("/v1/completions", **{**body, "max_tokens": 1})
    recent.sample(read_stats(llm.engine))
    now = stats(client)
    assert now["num_generation_tokens"] - before["num_generation_tokens"] == 9
    assert now["num_prompt_tokens"] > before["num_prompt_tokens"]
    assert now["num_cache_hits"] > before["num_cache_hits"]
    assert now["ttft_s"]["count"] == 3 and now["tpot_s"]["count"] == 2  # one token has none after it
    for times in (now["ttft_s"], now["tpot_s"]):
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] < 60
    assert (now["num_running"], now["num_waiting"], now["state"]) == (0, 0, "running")
    assert (now["model"], now["max_num_seqs"], now["max_model_len"]) == ("demo", 4, 1024)
    assert now["has_tokenizer"] and now["has_chat_template"]
    [sample] = now["samples"]
    assert sample[0] > 0 and sample[1] > 0 and now["num_samples"] == 1
    assert stats(client, since=1)["samples"] == []
    pages = now["pages"]
    assert pages["num_pages"] == llm.engine.scheduler.pool.num_pages and pages["page_size"] == 16
    assert pages["num_held"] == 0 and sum(pages["cached"]) == pages["num_cached"] > 0


@pytest.mark.parametrize("since", ["-1", "a", "1.5"])
def test_a_number_of_a_sample_is_a_whole_one(client: Client, since: str) -> None:
    response = client.get("/dashboard/stats", params={"since": since})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "since")


@pytest.mark.parametrize("num_pages", [2, 1000, 1280, 1281, 200_000])
def test_the_map_adds_up_in_few_cells(num_pages: int) -> None:
    from pjengine.page_pool import CACHED, FREE, HELD
    from pjengine.serving.dashboard import MAX_CELLS, page_map

    states = bytearray(num_pages)
    for page in range(1, num_pages):
        states[page] = (HELD, HELD, CACHED, FREE)[page % 4]
    found = page_map([states])
    per_cell, num_cells = found["pages_per_cell"], len(found["held"])
    assert num_cells == len(found["cached"]) == -(-num_pages // per_cell) <= MAX_CELLS
    assert per_cell == 1 or num_cells > MAX_CELLS // 2 - 1
    assert found["num_held"] == sum(found["held"]) == states.count(HELD)
    assert found["num_cached"] == sum(found["cached"]) == states.count(CACHED)
    last = states[(num_cells - 1) * per_cell :]
    assert (found["held"][-1], found["cached"][-1]) == (last.count(HELD), last.count(CACHED))
    assert found["held"][0] == states[:per_cell].count(HELD)
    both = page_map([states, states])
    assert (both["num_pages"], both["num_held"], both["num_null"]) == (
        2 * num_pages,
        2 * found["num_held"],
        2,
    )


def test_the_page_may_run_its_own_script_and_nothing_else(client: Client) -> None:
    response = client.get("/dashboard")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["require-trusted-types-for"] == "'script'"
    for element in ("script", "style"):
        [text] = re.findall(f"<{element}>(.*?)</{element}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in str(policy)
    assert set(re.findall(r"https?://[^'\"]*", response.text)) == {"http://www.w3.org/2000/svg"}  # a name


def test_the_page_is_part_of_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    others = [path.name for path in (ROOT / "serving").iterdir() if path.is_file() and path.suffix != ".py"]
    assert sorted(others) == sorted(data["pjengine.serving"])


@contextmanager
def open_page(server: Server, folder: Path, key: str | None = None) -> Iterator[Page]:
    assert BROWSER is not None
    folder.mkdir()
    with open_browser(BROWSER, folder) as page:
        page.password = key
        page.open(f"{server.url}/dashboard")
        page.wait_for(lambda: page.text("#model") == "demo", "the first numbers")
        yield page


def ask(page: Page, text: str) -> str | None:
    """Sends a message by keyboard alone, and waits for the whole reply."""
    page.type("#message", text)
    page.press("Enter", 13)
    page.wait_for(lambda: page.run("document.querySelector('.turn.live') === null"), "the reply")
    return page.run("[...document.querySelectorAll('.turn.assistant .text')].at(-1).textContent")


def api(server: Server, path: str, key: str | None = None, **body: Any) -> dict[str, Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = server.request("POST", path, {"temperature": 0, **body}, headers)
    request.read_all()
    answer: dict[str, Any] = json.loads(request.body)
    assert "choices" in answer, answer
    return answer["choices"][0]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    with start_server(folder, "--model=demo", "--port=0", f"--api-key={KEY}", *RANDOM) as server:
        yield server


@needs_browser
def test_a_chat_behind_a_key(guarded: Server, tmp_path: Path) -> None:
    html = "<img src=x onerror=alert(1)> & <b>bold</b>"
    with open_page(guarded, tmp_path / "profile", KEY) as page:
        assert page.text("#total-generation") == "0"
        nothing = page.text("#ttft-p50")
        page.type("#temperature", "0")
        page.type("#max-tokens", "24")
        messages = [{"role": "user", "content": html}]
        reply = ask(page, html)
        wanted = api(guarded, "/v1/chat/completions", KEY, messages=messages, max_tokens=24)
        assert reply == wanted["message"]["content"] and reply
        assert page.text(".turn.user .text") == html
        assert page.run("document.querySelectorAll('#log img, #log b').length") == 0
        second = ask(page, "and then?")
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "and then?"}]
        wanted = api(guarded, "/v1/chat/completions", KEY, messages=messages, max_tokens=24)
        assert second == wanted["message"]["content"]

        def count() -> int:
            return int((page.text("#total-generation") or "").replace(",", ""))

        page.wait_for(lambda: count() >= 96, "the count of tokens")
        page.wait_for(lambda: page.text("#ttft-p50") != nothing, "a time")
        curve = "document.querySelector('#generation-chart .curve').getAttribute('d')"
        page.wait_for(lambda: page.run(curve), "a curve")
        assert page.text("#num-cached") != "0" and page.text("#state") == "running"
        origins = {url.split("/dashboard")[0].split("/v1")[0] for url in page.requested()}
        assert origins == {guarded.url}
        refused = [
            text for text in page.problems() if "401" not in str(text)
        ]  # before the password was asked
        assert refused == []
    assert KEY not in guarded.log


@needs_browser
def test_a_reply_can_be_stopped_and_the_conversation_cleared(guarded: Server, tmp_path: Path) -> None:
    with open_page(guarded, tmp_path / "profile", KEY) as page:
        page.type("#max-tokens", "1000")
        page.type("#message", "write")
        page.press("Enter", 13)
        page.wait_for(lambda: page.text(".turn.assistant .text"), "the first text")
        assert page.text("#send") == "Stop"
        page.press("Escape", 27)
        page.wait_for(lambda: page.text("#send") == "Send", "the end")
        assert page.text(".turn.assistant .note") == "stopped"
        page.wait_for(lambda: page.text("#running") == "0", "the engine")
        page.run("document.querySelector('#clear').click()")
        assert page.run("document.querySelectorAll('.turn').length") == 0
        page.type("#temperature", "0")
        ask(page, "too long " * 1024)
        assert "max_model_len" in (page.text(".turn.assistant .note.bad") or "")
        assert ask(page, "short") and page.text("#send") == "Send"  # what was refused is no part of it


@needs_browser
def test_without_the_key_there_is_no_page(guarded: Server, tmp_path: Path) -> None:
    assert BROWSER is not None
    (tmp_path / "profile").mkdir()
    with open_browser(BROWSER, tmp_path / "profile") as page:
        page.password = "wrong"
        page.call("Page.navigate", url=f"{guarded.url}/dashboard")
        answers = page.wait_for(
            lambda: [event for event in page.events if event["method"] == "Fetch.authRequired"][1:],
            "being asked again",
        )
        assert answers[0]["authChallenge"]["scheme"] == "basic" and page.text("#model") is None


@needs_browser
def test_without_a_chat_template_a_text_is_continued(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    demo = ROOT / "models" / "demo"
    (tokenizer / "tokenizer.json").write_bytes((demo / "tokenizer.json").read_bytes())
    config = json.loads((demo / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = ("--model=demo", "--port=0", f"--tokenizer={tokenizer}", *RANDOM)
    with start_server(tmp_path, *arguments) as server, open_page(server, tmp_path / "profile") as page:
        assert page.text("#chat-title") == "Completion"
        page.type("#temperature", "0")
        page.type("#max-tokens", "12")
        wanted = api(server, "/v1/completions", prompt="import os ", max_tokens=12)["text"]
        assert ask(page, "import os ") == wanted and wanted
        assert page.problems() == []
        server.terminate()
        server.wait()
        page.wait_for(lambda: page.text("#state") == "the server does not answer", "the end of the server")


@needs_browser
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_fits_its_window(guarded: Server, tmp_path: Path, width: int) -> None:
    with open_page(guarded, tmp_path / "profile", KEY) as page:
        page.look(width, 800)
        page.wait_for(lambda: page.run("innerWidth") == width, "the size")
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(244, 245, 248)"
        page.look(width, 800, is_dark=True)
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(12, 15, 19)"
