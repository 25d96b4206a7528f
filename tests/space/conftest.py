"""A server of the demo in a process of its own, and a browser to look at it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..end_to_end.conftest import answering, clip  # noqa: F401  fixtures

ROOT = Path(__file__).parents[2]
# As root in a container there is no sandbox; the others keep Chromium from looking for hosts outside.
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_SECONDS = 180


@contextmanager
def serving(model: Path | None) -> Iterator[str]:
    """The address of a demo that runs as a user starts it."""
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "spaces_demo" / "app.py"), "--port", str(port), "--device", "cpu"]
    command += [] if model is None else ["--model", str(model)]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(address: str, server: subprocess.Popen):
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, f"the demo ended with code {server.returncode}"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the demo did not answer within {START_SECONDS} s")


@pytest.fixture(scope="session")
def demo(answering) -> Iterator[str]:  # noqa: F811
    with serving(answering) as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    """Chromium as the system has it. CI installs it; elsewhere the tests are left out without it."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and os.environ.get("CI"):
        pytest.fail("CI must have Chromium: see .ci/run")
    if path is None:
        pytest.skip("needs Chromium, for example: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()
