"""Debian's Chromium, without a screen and without a network."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

PROGRAMS = ("chromium", "chromedriver")


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1000, theme: str = "light") -> None:
        """Show a page in a window of so many pixels, to a person who prefers a light or a dark theme."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(url)

    def run(self, script: str, *arguments: object) -> Any:
        """What a script in the page returns."""
        return self.driver.execute_script(script, *arguments)

    @property
    def errors(self) -> list[str]:
        """What the page has complained of since the last time."""
        return [one["message"] for one in self.driver.get_log("browser") if one["level"] != "WARNING"]

    def photograph(self, file: Path) -> None:
        """The whole page, to look at."""
        size = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], 6000), "scale": 1}
        told = {"captureBeyondViewport": True, "clip": clip}
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", told)
        file.write_bytes(base64.b64decode(taken["data"]))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = [shutil.which(name) for name in PROGRAMS]
    if not all(found):
        pytest.skip("NOT RUN: a browser; type apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    for flag in (
        "--headless=new",
        "--no-sandbox",  # which root has none of
        "--disable-dev-shm-usage",
        "--disable-3d-apis",  # TensorBoard then draws SVG, which a test can look into
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(found[1])))
    yield Browser(driver)
    driver.quit()
