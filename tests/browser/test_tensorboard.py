"""TensorBoard on a job's event log, in a browser."""

import re
import subprocess
import sys

from selenium.webdriver.support.ui import WebDriverWait

from tests.browser.conftest import Browser
from tests.harness import Job

# The points of each line of the card "loss/current".
_LINES = """
const cards = [...document.querySelectorAll("card-view")];
const card = cards.find(one => one.textContent.includes("loss/current"));
const lines = card ? [...card.querySelectorAll("line-chart path")].filter(one => one.style.stroke) : [];
return lines.map(one => one.getAttribute("d").split("L").length);
"""


def test_the_loss_of_a_job_is_drawn(browser: Browser, ready: Job) -> None:
    result = ready.run("--max_train_epochs=1")
    assert result.code == 0, result.out + result.err
    logs = ready.tree / "output" / "tensorboard"
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logs}", "--port=0", "--load_fast=false"]
    with subprocess.Popen(
        [*command, "--host=127.0.0.1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in server.stdout)
            url = next(found[0] for found in said if found)
            browser.open(url)
            lines = WebDriverWait(browser.driver, 60).until(lambda _: browser.run(_LINES))
            assert set(lines) == {len(ready.steps)}
            assert browser.errors == []
        finally:
            server.terminate()
