import base64
import hashlib
import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sanity.report.page import html
from sanity.report.runs import read_all
from tests.stored import IMAGES, METHODS, STAGES, header, scores, store

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    store(base / "a", "net_a", ("cascading", "independent"))
    store(
        base / "b", "net_b<script>alert(1)</script>", untouched_parameters=[], unchanged_parameters={"0/c/1": ["w.x"]}
    )
    return read_all([base / "a", base / "b"])


@pytest.fixture(scope="module")
def page(runs):
    return html(runs)


class Tags(HTMLParser):
    """Every tag with its attributes, and the text inside script and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.texts = [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in ("script", "style"):
            self.texts.append((self.inside, self.tags[-1][1], data))


def test_the_page_loads_nothing_from_elsewhere(page):
    tags = Tags(page).tags
    loading = {"src", "srcset", "poster", "data", "action", "background", "formaction", "manifest"}
    for tag, attributes in tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert all(value.startswith("data:image/png;base64,") for name, value in attributes.items() if name in loading)
        if "href" in attributes:
            assert tag == "a"
            assert attributes["href"].startswith(("#", "https://arxiv.org/abs/1810.03292"))
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", page)


def test_its_policy_forbids_anything_but_its_own_style_and_script(page):
    found = Tags(page)
    (policy,) = (a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    code = [(kind, text) for kind, attributes, text in found.texts if attributes.get("type") != "application/json"]
    assert [kind for kind, _ in code] == ["style", "script"]
    for kind, text in code:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any(name == "style" or name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_names_cannot_become_markup(page):
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "a<b>" not in page


def test_what_was_run_and_what_is_missing_stand_in_plain_sight(page):
    for words in (
        "Fail: guided_backprop",
        "18 of 160 scores are NaN: 18 for a constant map.",
        "3 of 4 maps",
        "1 parameter in no stage, still trained at the end: norm.weight.",
        "<code>norm.weight</code>",
        "Every parameter of the network is in a stage.",
        "at 0/c/1 (seed/order/stage)",
        "<code>w.x</code>",
        "--model net_a",
        "@inproceedings{adebayo2018sanity,",
        "&#34;weights_sha256&#34;: &#34;" + "ab" * 32,
        "These runs differ in more than the network: orders",
    ):
        assert words in page


def test_headers_that_do_not_tell_are_not_spoken_for(tmp_path):
    folder = store(tmp_path / "run")
    known = header()
    for name in ("untouched_parameters", "unchanged_parameters"):
        del known[name]
    (folder / "run.json").write_text(json.dumps(known))
    text = html(read_all([folder]))
    assert "Parameters outside all stages were not recorded." in text
    assert "Every parameter of the network" not in text
    assert "left as they were have not been recorded" in text


def data_of(page):
    (text,) = (text for _, attributes, text in Tags(page).texts if attributes.get("id") == "data")
    return json.loads(text)


def test_the_curves_are_drawn_from_the_summary(page, runs):
    data = data_of(page)["runs"][0]
    assert data["orders"]["cascading"]["stages"] == list(STAGES)
    assert data["orders"]["independent"]["joined"] is False
    for order, own in data["orders"].items():
        want = runs[0].summary.query(f"order == '{order}' and similarity == 'hog' and method == 'mask'")
        got = np.array(own["mean"]["hog"]["mask"], float)
        np.testing.assert_allclose(got, want[["mean", "low", "high", "n", "n_nan"]], rtol=0, atol=0.00051)
    single = data["orders"]["cascading"]["image"]["ssim"]["mask"]
    rows = scores("net_a").query("similarity == 'ssim' and method == 'mask' and image == 'cat'")
    np.testing.assert_allclose(single["cat"], rows["value"], rtol=0, atol=0.00051)
    assert single["dog"] == [1.0, None, None, None]


def test_a_page_of_very_many_pictures_keeps_the_scores_of_some(tmp_path, monkeypatch):
    monkeypatch.setattr("sanity.report.page.MOST_VALUES", 2 * 40)
    text = html(read_all([store(tmp_path / "run")]))
    assert data_of(text)["runs"][0]["images"] == list(IMAGES[:2])
    assert "Curves of single pictures: the first 2 of 4." in text


def test_a_page_without_strips_or_predictions(tmp_path):
    folder = store(tmp_path / "run")
    (folder / "strips.npz").unlink()
    assert '<figure class="strip"' not in html(read_all([folder]))
    folder = store(folder)
    (folder / "predictions.parquet").unlink()
    text = html(read_all([folder]))
    assert "network says" not in text
    assert text.count('<figure class="strip"') == 2


def test_pixels_of_maps_are_small_pngs(page):
    sizes = [len(base64.b64decode(uri)) for uri in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(sizes) == 3 * 2 * (1 + len(METHODS) * len(STAGES) - 2)
    assert max(sizes) < 3000


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    """A real browser, or a skip that says what is missing."""
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("no selenium here: pip install selenium")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with chromedriver here")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_script_timeout(120)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def file(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def visit(chrome, file: Path, size):
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    chrome.get(file.as_uri())
    wait(chrome, "document.querySelectorAll('.plot svg').length === 6")


def wait(chrome, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(chrome, 30).until(lambda c: c.execute_script(f"return {condition}"))


def choose(chrome, **values):
    for name, value in values.items():
        chrome.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('change', {bubbles: true}))",
            name,
            value,
        )


def shown(chrome, selector):
    """Visible elements' data attributes."""
    return chrome.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length)"
        ".map(e => ({...e.dataset}))",
        selector,
    )


def test_browser_opens_the_page_without_network_or_errors(chrome, file):
    chrome.get_log("performance")
    chrome.get_log("browser")
    visit(chrome, file, DESKTOP)
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    # chrome: is the browser's own empty tab
    assert {url for url in asked if not url.startswith(("data:", "chrome:"))} == {file.as_uri()}
    assert chrome.get_log("browser") == []
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    wait(chrome, f"{broken} === 0")


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 600)], ids=str)
def test_browser_never_scrolls_sideways(chrome, file, size):
    visit(chrome, file, size)
    chrome.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    width, window = chrome.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= window <= size[0]
    small = chrome.execute_script(
        "const told = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length;"
        "return [...document.querySelectorAll('main *, header *')].filter(told)"
        ".filter(e => parseFloat(getComputedStyle(e).fontSize) < 10).map(e => e.outerHTML)"
    )
    assert small == []


def test_browser_filters_by_run_order_similarity_picture_and_method(chrome, file):
    visit(chrome, file, DESKTOP)
    assert len(shown(chrome, ".chart")) == 6
    assert len(shown(chrome, ".strip")) == 6
    choose(chrome, run="0")
    assert {d["run"] for d in shown(chrome, "figure")} == {"0"}
    choose(chrome, order="independent", similarity="hog")
    assert shown(chrome, ".chart") == [{"run": "0", "order": "independent", "similarity": "hog"}]
    assert {d["order"] for d in shown(chrome, ".strip")} == {"independent"}
    assert shown(chrome, ".boards .scroll") == []
    assert {d["score"] for d in shown(chrome, ".score")} == {"hog"}
    choose(chrome, run="", order="", similarity="ssim", image="cat")
    assert {d["image"] for d in shown(chrome, ".strip")} == {"cat"}
    assert len(shown(chrome, ".chart")) == 3
    assert "cat alone" in chrome.find_element("css selector", ".chart figcaption").text
    choose(chrome, image="dog")
    assert shown(chrome, ".strip") == []
    assert chrome.find_element("css selector", "#strips .empty").is_displayed()
    choose(chrome, image="", similarity="")
    chrome.find_element("id", "none").click()
    assert shown(chrome, "tbody tr") == []
    chrome.find_element("css selector", "input[value=mask]").click()
    assert {d["method"] for d in shown(chrome, "tbody tr")} == {"mask"}
    assert {d["line"] for d in shown(chrome, ".plot g")} == {"mask"}
    said = chrome.find_element("id", "chosen").text
    assert said == "showing 1 of 5 methods"


def test_browser_shows_nan_in_the_chart_and_its_numbers(chrome, file, runs):
    visit(chrome, file, DESKTOP)
    chart = chrome.find_element("css selector", ".chart")
    counts = [e.text for e in chart.find_elements("css selector", ".plot .lack")]
    assert counts == ["NaN", "3", "3", "3"]
    assert re.search(r"mask -0\.0[12] \(3 NaN\)", chart.find_element("css selector", ".readout").text)
    choose(chrome, image="dog")
    said = chart.find_element("css selector", ".readout").text
    assert "mask n/a (1 NaN)" in said
    want = scores("net_a").query("stage_index == 3 and similarity == 'ssim' and image == 'dog'").set_index("method")
    assert f"guided_backprop {want['value']['guided_backprop']:.2f}" in said


def test_browser_draws_what_the_summary_says(chrome, file, runs):
    """The markers of a line stand where its means are, on the scale that the axis' own labels give."""
    visit(chrome, file, DESKTOP)
    scale, marks = chrome.execute_script("""
        const svg = document.querySelector(".plot svg");
        const at = e => e.transform.baseVal[0].matrix;
        const labels = [...svg.querySelectorAll("text.soft")];
        const marks = [...svg.querySelectorAll("g[data-line=guided_backprop] path[transform]")];
        return [labels.map(e => [+e.textContent, e.getAttribute("y") - 4]), marks.map(e => [at(e).e, at(e).f])];
    """)
    values, places = np.array(scale).T
    slope, offset = np.polyfit(places, values, 1)
    x, y = np.array(marks).T
    own = runs[0].summary.query("order == 'cascading' and similarity == 'ssim' and method == 'guided_backprop'")
    np.testing.assert_allclose(slope * y + offset, own["mean"], rtol=0, atol=0.002)
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], rtol=1e-4)


def test_browser_needs_no_mouse(chrome, file):
    """Tab reaches every control in order; arrows move the slider, space switches a method."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    visit(chrome, file, DESKTOP)
    press = lambda key: ActionChains(chrome).send_keys(key).perform()  # noqa: E731
    focus = "const e = document.activeElement; return [e.tagName, e.id, e.name || '', e.value || '', e.className]"
    press(Keys.TAB)
    assert chrome.execute_script(focus)[4] == "skip"
    ring = chrome.execute_script(
        "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]"
    )
    assert ring == ["solid", "3px"]
    seen = []
    while len(seen) < 60 and (not seen or seen[-1][1] != "none"):
        press(Keys.TAB)
        seen.append(chrome.execute_script(focus))
    assert [s[1] for s in seen if s[0] == "SELECT"] == ["run", "order", "similarity", "image"]
    press(Keys.TAB)
    assert chrome.execute_script(focus)[2:4] == ["method", "gradient"]
    press(Keys.SPACE)
    assert "gradient" not in {d["line"] for d in shown(chrome, ".plot g")}
    slider = chrome.find_element("css selector", ".chart input[type=range]")
    chrome.execute_script("arguments[0].focus()", slider)
    press(Keys.ARROW_LEFT)
    assert slider.get_attribute("aria-valuetext") == STAGES[-2]
    assert chrome.find_element("css selector", ".readout b").text == STAGES[-2]
    press(Keys.HOME)
    assert chrome.find_element("css selector", ".readout b").text == STAGES[0]


def test_browser_folds_the_filters_on_a_phone(chrome, file):
    visit(chrome, file, PHONE)
    assert chrome.execute_script("return document.querySelector('#filters details').open") is False
    tall = chrome.execute_script("return document.querySelector('#filters').offsetHeight")
    assert tall < 80


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=str)
def test_browser_finds_no_barrier(chrome, file, size):
    """axe-core's rules, contrast among them; it comes with the package axe-playwright-python."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None:
        pytest.skip("no axe-core here: pip install axe-playwright-python")
    visit(chrome, file, size)
    chrome.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    source = next(Path(found.submodule_search_locations[0]).glob("**/axe*.js")).read_text(encoding="utf-8")
    chrome.execute_cdp_cmd("Runtime.evaluate", {"expression": source})
    passed, failed = chrome.execute_async_script(
        "axe.run().then(r => arguments[0]([r.passes.map(p => p.id), r.violations.map(v => [v.id, v.nodes[0].html])]))"
    )
    assert failed == []
    assert {"color-contrast", "label", "select-name", "image-alt", "scrollable-region-focusable"} <= set(passed)
