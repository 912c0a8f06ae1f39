# SPDX-License-Identifier: Apache-2.0
"""The page in a real Chromium, served by the command as a visitor's host would run it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

PHONE = (390, 844)


@pytest.fixture
def browser() -> Iterator[WebDriver]:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.fail("no browser: run apt-get install chromium chromium-driver, as scripts/test.sh tries to")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    yield driver
    driver.quit()


def words_in(browser: WebDriver, element: str) -> str:
    return browser.find_element(By.ID, element).text


def hosts_asked(browser: WebDriver) -> set[str]:
    """Hosts of all requests that the page made."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [
        each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"
    ]
    return {urlsplit(address).hostname for address in addresses if not address.startswith(("data:", "blob:"))}


@pytest.mark.slow
def test_a_visitor_uploads_a_clip_sees_an_answer_and_another_one_without_the_face(
    browser, tiny_model, tiny_processor, make_clip, tmp_path
):
    with torch.no_grad():
        for parameter in tiny_model.head.parameters():
            parameter *= 3
    tiny_model.save_pretrained(tmp_path / "run")
    tiny_processor.save_pretrained(tmp_path / "run")
    clip = make_clip(tmp_path / "my clip.mp4", seconds=0.6, fps=10)
    (tmp_path / "notes.txt").write_text("no media")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "msa_online_cli", "serve", str(tmp_path / "run"), "--port", port]
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert f"at http://127.0.0.1:{port}" in (server.stdout.readline() or server.stderr.read())
            browser.get(f"http://127.0.0.1:{port}")
            wait = WebDriverWait(browser, 30)
            wait.until(lambda _: browser.find_elements(By.ID, "predict"))
            browser.find_element(By.CSS_SELECTOR, "#video input[type=file]").send_keys(str(clip))
            browser.find_element(By.CSS_SELECTOR, "#text textarea").send_keys("a good movie")
            wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#video video"))
            browser.find_element(By.ID, "predict").click()
            wait.until(lambda _: "Predicted score" in words_in(browser, "result"))
            everything = words_in(browser, "result")
            assert len(browser.find_elements(By.CSS_SELECTOR, "#result .faces img")) == 4
            browser.find_elements(By.CSS_SELECTOR, "#used input")[2].click()
            wait.until(lambda _: "The face\noff" in words_in(browser, "result"))
            faceless = words_in(browser, "result")
            assert faceless.split("negative")[0] != everything.split("negative")[0]
            assert not browser.find_elements(By.CSS_SELECTOR, "#result .faces img")
            phone = {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 1, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
            assert hosts_asked(browser) == {"127.0.0.1"}, "the page needs another host"
            errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
            assert not errors
            browser.get("about:blank")
            until = time.monotonic() + 20
            while [*temporary.rglob("*.mp4")] and time.monotonic() < until:
                time.sleep(0.1)
            assert not [*temporary.rglob("*.mp4")], "the clip stays after its visitor has left"
        finally:
            server.send_signal(signal.SIGTERM)
            out, errors = server.communicate(timeout=30)
        assert server.returncode == 0 and out == "stopped; all uploads are deleted\n" and not errors, errors
        assert not [*temporary.glob("msa_online_page_*")]
