"""A headless Chromium, driven by chromedriver's own protocol (W3C WebDriver): no package is needed."""

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
# As root, and without the background connections that a closed network refuses.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One session."""

    def __init__(self, port, session=""):
        self._root = f"http://127.0.0.1:{port}/session"
        flags = [*FLAGS, f"--user-data-dir={session}"]
        options = {"binary": BROWSER, "args": flags}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._id = self._ask("POST", self._root, {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def open(self, path, width=900, dark=False):
        """Open a file in a window of `width` pixels."""
        self._cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._cdp("Emulation.setEmulatedMedia", features=features)
        self._post("url", url=path.as_uri())

    def run(self, script):
        """Return the value of a function's body in the page."""
        return self._post("execute/sync", script=script, args=[])

    def choose(self, selector, text):
        """Choose an entry of a list by typing, as a user of the keyboard does."""
        element = self._post("element", using="css selector", value=selector)[ELEMENT]
        self._post(f"element/{element}/value", text=text)

    def errors(self):
        """Return what the console has of errors: blocked resources and scripts among them."""
        return [entry["message"] for entry in self._post("se/log", type="browser") if entry["level"] == "SEVERE"]

    def close(self):
        self._ask("DELETE", f"{self._root}/{self._id}")

    def _cdp(self, command, **parameters):
        return self._post("goog/cdp/execute", cmd=command, params=parameters)

    def _post(self, what, **body):
        return self._ask("POST", f"{self._root}/{self._id}/{what}", body)

    def _ask(self, method, url, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


@contextlib.contextmanager
def started():
    """Start driver and browser, and end them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(f"{folder}/log", "w+") as log:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=log, stderr=subprocess.STDOUT)
        try:
            browser = Browser(_port(f"{folder}/log", driver), f"{folder}/profile")
            try:
                yield browser
            finally:
                browser.close()
        finally:
            driver.terminate()
            driver.wait(30)


def _port(path, driver):
    """Return the port that the driver has chosen, which it prints."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends and driver.poll() is None:
        with open(path) as log:
            for line in log:
                if "started successfully on port" in line:
                    return int(line.rstrip(".\n").rpartition(" ")[2])
        time.sleep(0.1)
    raise RuntimeError("chromedriver does not start")
