"""The site in headless Chromium, from the folder that `make docs` writes: opened as files, and from a server."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_report_browser import FLAGS

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
PAGES = ("index.html", "features.html", "tutorials/linen.html", "api/lora_jax.html", "api/data.html", "section-7.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    subprocess.run(build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


@pytest.fixture(scope="module", params=["files", "server"])
def address(site, request):
    """Where the site begins, as a URL."""
    if request.param == "files":
        yield site.as_uri()
        return

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


def asked_for(driver):
    """The URLs of all requests since the last look."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def found(driver, words, place):
    """Whether a search for `words` comes to list a result at `place`."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    driver.execute_script("document.querySelector('[data-md-component=search-query]').focus()")
    driver.switch_to.active_element.send_keys(words)
    links = "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    try:
        WebDriverWait(driver, 30).until(lambda _: any(place in link for link in driver.execute_script(links)))
    except TimeoutException:
        return False
    return True


def test_pages_load_from_here_alone_and_the_console_is_silent(driver, address):
    asked_for(driver)
    for page in PAGES:
        driver.get(f"{address}/{page}")
        assert driver.find_element("tag name", "h1").text
        assert driver.get_log("browser") == []
        images = "return [...document.images].filter(image => image.loading != 'lazy' && !image.naturalWidth).length"
        assert driver.execute_script(images) == 0
    elsewhere = [url for url in asked_for(driver) if not url.startswith((address, "data:", "chrome:", "about:"))]
    assert elsewhere == []


def test_no_page_names_a_file_elsewhere(site):
    """Scripts, styles, pictures and frames; links that a reader follows may lead anywhere."""
    loads = re.compile(r"""<(?:script|img|iframe|source|video|link)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>""")
    for path in site.rglob("*.html"):
        assert [tag for tag in loads.findall(path.read_text()) if 'rel="canonical"' not in tag] == [], path


def test_the_search_finds_a_page_and_a_public_name(driver, address):
    driver.get(f"{address}/index.html")
    asked_for(driver)
    assert found(driver, "targets", "/targets.html")
    driver.get(f"{address}/index.html")
    assert found(driver, "merge_report", "/api/lora_jax.html#lora_jax.merge_report")
    assert [url for url in asked_for(driver) if not url.startswith((address, "data:", "about:", "blob:"))] == []
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_screen_scrolls_in_one_direction(driver, address, width):
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for page in PAGES:
            driver.get(f"{address}/{page}")
            assert driver.execute_script("return window.innerWidth") == width
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width, page
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_public_name_has_its_place_in_the_reference(site):
    import lora_jax

    for path in (site / "api").glob("*.html"):
        module = "lora_jax" if path.stem == "lora_jax" else f"lora_jax.{path.stem}"
        assert len(re.findall(rf'<h2 id="{re.escape(module)}\.\w+"', path.read_text())) >= 2, module
    page = (site / "api" / "lora_jax.html").read_text()
    assert [name for name in lora_jax.__all__ if f'<h2 id="lora_jax.{name}"' not in page] == []
