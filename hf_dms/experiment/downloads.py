"""Downloads of packages, from the registries that pip and apt-get are configured for."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import HfDmsError

ERROR_LINES = 5  # number of last lines of a failed command to show


def pip_download(package: str, folder: Path, *options: str) -> Path:
    """Download one file of a Python package, without its dependencies.

    Args:
        package: `name==version`.
        folder: folder for the file; it must not hold another wheel or source archive.
        options: further options of `pip download`.

    Returns:
        The wheel or the source archive.

    Raises:
        HfDmsError: this Python has no pip, or the download failed.
    """
    # PathFinder, because importlib.util.find_spec("pip") goes through setuptools, which may warn about distutils.
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise HfDmsError(
            f"{package} is downloaded with pip, which {sys.executable} does not have. Run: python -m ensurepip."
        )
    run(
        f"{package} could not be downloaded. Is the package registry that pip uses in reach?",
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *(*options, package, "--dest", str(folder)),
    )
    (file,) = (file for file in folder.iterdir() if file.suffix in (".whl", ".gz"))
    return file


def deb_download(package: str, folder: Path) -> Path:
    """Download and unpack a Debian package, without installing it.

    Args:
        package: its name.
        folder: where the package and its files go.

    Returns:
        The folder that corresponds to `/` in the package.

    Raises:
        HfDmsError: the machine has no apt-get or dpkg-deb, or one of them failed.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise HfDmsError(
                f"{package} is a Debian package, and there is no {tool} here. Fetch on Debian or Ubuntu (a container "
                "will do), and copy the folder."
            )
    failed = f"The Debian package {package} could not be downloaded. `apt-get update` may be due."
    run(failed, "apt-get", "download", "--quiet", package, cwd=folder)
    (file,) = folder.glob("*.deb")
    root = folder / "root"
    run(f"{file.name} could not be unpacked.", "dpkg-deb", "--extract", str(file), str(root))
    return root


def check_installed(module: str, package: str) -> None:
    """Check that a Python package which is needed to convert a download is installed.

    Args:
        module: module to import.
        package: name of its package, for the message.

    Raises:
        HfDmsError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise HfDmsError(f"This needs {package}: pip install 'hf_dms[quickstart]'.")


def run(failed: str, *command: str, cwd: Path | None = None) -> None:
    """Run a command.

    Args:
        failed: message if it fails. The command's last lines of output follow it.
        command: a program and its arguments.
        cwd: the folder it runs in.

    Raises:
        HfDmsError: its exit code is not 0.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        last = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-ERROR_LINES:])
        raise HfDmsError(f"{failed} `{' '.join(command)}` ended with {done.returncode}:\n{last}")
