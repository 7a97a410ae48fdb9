"""A real Chromium without a window, for pages that are files."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PHONE = (390, 844)


def open_page(page, folder, size=PHONE, dark=False):
    """Open a page in a browser of its own.

    Returns:
        The DOM as it stands then, as text, and the file of a screenshot.
    """
    shot = Path(folder, "dark.png" if dark else "light.png")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={Path(folder, 'profile')}", f"--window-size={size[0]},{size[1]}"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={shot}", "--dump-dom"]
    done = subprocess.run([*command, Path(page).as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, shot
