"""The report in headless Chromium: it renders, asks for nothing, and works by keyboard and on a narrow screen."""

import json
import shutil

import pytest
from report_cases import Planted

from lora_jax import report

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A driver with the report open: of planted truth, and with a name too long for any screen."""
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("browser")
    planted = Planted()
    long = "model.layers.0." + "very_long_name_" * 12
    for table in (planted.updates, planted.others, planted.weights):
        table[long] = next(iter(table.values()))
    found = list(report.measure(planted.updates, weight=planted.weights.__getitem__, against=planted.others))
    report.write(folder / "report", found, title="A planted adapter", sources={"adapter": "/a/" + "long_path" * 30})
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_window_size(1280, 900)
    driver.get_log("performance")  # the empty page that it starts with
    driver.get((folder / "report" / "report.html").as_uri())
    yield driver
    driver.quit()


def test_it_renders_and_says_nothing_on_the_console(page):
    assert page.title == "A planted adapter"
    assert page.execute_script("return document.querySelectorAll('figure svg').length") == 12
    assert page.execute_script("return document.querySelectorAll('table caption').length") == 3
    unseen = "return [...document.querySelectorAll('section > figure svg')].filter(s => s.clientHeight < 100).length"
    assert page.execute_script(unseen) == 0
    assert page.get_log("browser") == []


def test_it_asks_for_nothing(page):
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    browsers_own = ("data:", "chrome:")
    assert [url for url in asked if not url.startswith(browsers_own)] == [page.current_url.split("#")[0]]


def test_colours_follow_the_screen(page):
    colours = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        script = "return ['body', 'figure svg text'].map(s => getComputedStyle(document.querySelector(s))).map(s => "
        colours.append(page.execute_script(script + "[s.color, s.fill, s.backgroundColor])"))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    light, dark = colours
    assert light[0][2] != dark[0][2]
    assert light[1][1] != dark[1][1]  # the text of figures


def test_the_keyboard_reaches_everything_and_opens_what_is_folded(page):
    from selenium.webdriver import ActionChains, Keys

    page.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    seen = []
    for _ in range(80):
        ActionChains(page).send_keys(Keys.TAB).perform()
        found = page.execute_script(
            "const e = document.activeElement;"
            "return [e.tagName, e.getAttribute('class'), getComputedStyle(e).outlineStyle]"
        )
        if found[0] == "BODY":
            break
        seen.append(found)
    kinds = [(tag, name) for tag, name, *_ in seen]
    assert kinds[0] == ("A", "skip")
    assert [tag for tag, _ in kinds[1:8]] == ["A"] * 6 + ["DIV"]  # the parts, then the first table
    assert sum(tag == "SUMMARY" for tag, _ in kinds) == page.execute_script(
        "return document.querySelectorAll('summary').length"
    )
    assert sum(kind == ("DIV", "scroll") for kind in kinds) == 1 + 6  # what is folded is not there yet
    assert all(outline == "solid" for _, _, outline in seen)

    summary = page.find_element("css selector", "#overlap summary")
    page.execute_script("arguments[0].focus()", summary)
    opened = "return arguments[0].parentElement.open"
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert page.execute_script(opened, summary)
    ActionChains(page).send_keys(Keys.SPACE).perform()
    assert not page.execute_script(opened, summary)


def test_the_skip_link_leads_to_the_results(page):
    from selenium.webdriver import ActionChains, Keys

    page.execute_script("document.querySelector('.skip').focus()")
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert page.execute_script("return document.activeElement.id") == "main"


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_screen_scrolls_in_one_direction(page, width):
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    try:
        assert page.execute_script("return window.innerWidth") == width
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        wide = page.execute_script(
            "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        )
        assert all(box.get_attribute("tabindex") == "0" for box in wide)
        assert wide
    finally:
        page.execute_script("document.querySelectorAll('details').forEach(d => d.open = false)")
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
