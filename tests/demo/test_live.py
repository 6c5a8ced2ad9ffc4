"""``fastzs demo`` as a process: the examples of docs/demo.md, and the page in a real browser.

``python -m tests.demo.test_live PICTURE`` keeps what the page looks like, for the docs.
"""

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastzs import Segmentation

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "docs" / "pictures" / "scene.png"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = '<img src=x onerror="document.title=1">${7*7}{{value}}'
PAINTED = """
    return [...document.querySelectorAll("canvas")].filter((one) => one.dataset.painted === one.dataset.map).length"""
OPACITY = """
    const canvas = document.querySelector("canvas"), data = canvas.getContext("2d").getImageData(0, 0, 300, 200).data;
    return [...new Set(data.filter((_, i) => i % 4 == 3))].sort((a, b) => a - b)"""

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The page's address while its process runs, which is then told to end."""
    command = [sys.executable, "-m", "fastzs", "demo", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert found, "the page did not start"
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


@contextlib.contextmanager
def browser(downloads: Path, size: str = "1320,1000") -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={size}"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def until(what: Callable[[], Any]) -> Any:
    """What ``what`` gives once it gives something."""
    end = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)
    return found


class Page:
    """What a person does with the page."""

    def __init__(self, driver: Any, url: str):
        self.driver = driver
        driver.get(url)
        until(lambda: driver.execute_script(PAINTED))

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText.trim())"
        return self.driver.execute_script(script, selector)  # at one moment

    def upload(self, *files: Path) -> None:
        for clear in self.driver.find_elements("css selector", "#files button[aria-label=Clear]"):
            clear.click()
        box = until(lambda: self.driver.find_elements("css selector", "#files input[type=file]"))[0]
        box.send_keys("\n".join(map(str, files)))

    def ask(self, names: str) -> None:
        """Type names and press Enter."""
        from selenium.webdriver.common.keys import Keys

        box = self.find("#names textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(names, Keys.ENTER)

    def choose(self, background: str) -> None:
        script = "[...document.querySelectorAll('label')].find((one) => one.innerText.trim() === arguments[0]).click()"
        self.driver.execute_script(script, background)

    def legend(self) -> set[str]:
        return {*self.texts(".legend b")}

    def other_hosts(self, url: str) -> list[str]:
        """What the browser asked others for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        assert any(one.startswith(url) for one in sent)
        return [one for one in sent if not one.startswith((url, "data:", "blob:"))]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One process for all tests; at its end uploads are gone."""
    folders = {*Path(tempfile.gettempdir()).glob("fastzs-demo-*")}
    with served() as address:
        own = {*Path(tempfile.gettempdir()).glob("fastzs-demo-*")} - folders
        assert own
        yield address
    assert not any(folder.exists() for folder in own)


def test_the_examples_of_the_docs(url, tmp_path, monkeypatch, capsys):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    shutil.copy(SCENE, tmp_path / "docs" / "pictures")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8").replace("http://127.0.0.1:7860", url)
    (curl,) = re.findall(r"^```bash\n(curl .*?)^```", page, re.MULTILINE | re.DOTALL)
    subprocess.run(["bash", "-euc", curl], check=True)
    assert Segmentation.load("labels.png").names == ("blue moon", "pink cross", "background")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/demo.md", "exec"), {})
    *areas, timing = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in areas] == ["1", "2"]
    assert timing.startswith("label;dur=")


@pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)
def test_the_page(url, tmp_path):
    second = tmp_path / "second <b>.png"
    shutil.copy(SCENE, second)
    with browser(tmp_path) as driver:
        page = Page(driver, url)  # it begins with a drawing and its names
        assert "network encoded the image in" in page.texts(".facts")[0]
        assert {"orange square", "wood"} <= page.legend()

        page.upload(SCENE)
        page.ask("blue moon, pink cross, gravel")
        until(lambda: page.legend() == {"blue moon", "pink cross", "gravel"})
        assert page.texts(".answer figcaption")[0].startswith("scene.png 384 x 256")
        until(lambda: driver.execute_script(PAINTED))
        page.ask("blue moon, cross | pink cross, cyan heart, gravel")  # names again
        until(lambda: page.legend() == {"blue moon", "cross", "cyan heart", "gravel"})
        assert "the network did not run" in page.texts(".facts")[0]

        until(lambda: driver.execute_script(PAINTED))
        plain = driver.execute_script(OPACITY)
        item = page.find(".legend li")
        driver.execute_script("arguments[0].focus()", item)  # as the pointer does
        until(lambda: driver.execute_script(OPACITY) != plain)
        assert "chosen" in item.get_attribute("class")

        page.find(".links a").click()
        file = until(lambda: [*tmp_path.glob("scene_labels.png")])[0]
        assert Segmentation.load(file).names == ("blue moon", "cross", "cyan heart", "gravel")

        page.ask(HOSTILE)
        assert HOSTILE.split("$")[0] in until(lambda: page.texts("[role=alert]"))[0]
        assert "${7*7}{{value}}" in page.texts("[role=alert]")[0]
        assert driver.title == "fastzs"

        large = tmp_path / "large.png"
        large.write_bytes(bytes((20 << 20) + 1))
        page.upload(large)
        until(lambda: re.search(r"exceed .* of 20(\.0)? ?M.*large\.png", page.texts("body")[0]))

        page.choose("prompt")
        page.upload(SCENE, second)  # side by side
        page.ask("blue moon, pink cross")
        until(lambda: len(page.texts(".answer")) == 2 == driver.execute_script(PAINTED))
        assert page.texts(".answer figcaption")[1].startswith("second")
        assert page.legend() == {"blue moon", "pink cross", "background"}
        assert page.other_hosts(url) == []
        errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert errors == []


def main(picture: str) -> None:
    """Keep what the page looks like."""
    with tempfile.TemporaryDirectory() as folder, served() as url, browser(Path(folder), "1280,1010") as driver:
        page = Page(driver, url)
        page.choose("prompt")
        page.ask("square | orange square | cyan square, yellow disc, cyan heart, purple star, green ring")
        until(lambda: page.legend() >= {"square", "background"} and driver.execute_script(PAINTED))
        time.sleep(1)  # gradio fades things in
        shown = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
        shown.convert("RGB").save(picture, quality=90)


if __name__ == "__main__":
    main(sys.argv[1])
