"""Downloads that break off, and come again; locks that others hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from package_index import MODEL, SOURCE
from server import Server

from edgelm import disk, download, hub
from edgelm.errors import SourceError


def test_a_broken_connection_is_resumed(package: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after = [100_000, 0, 50_000]
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    ranges = [r.headers.get("Range") for r in package.asked("/files/some_model-1.0-py3-none-any.whl")]
    assert ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_a_server_that_is_gone_is_given_up_and_resumed_later(package: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after = [100_000] + [0] * download.ATTEMPTS
    with pytest.raises(SourceError, match=r"connection broke after 100000 of"):
        hub.resolve(SOURCE)
    assert hub.resolve(SOURCE).read_bytes() == MODEL
    assert package.asked("/files/some_model-1.0-py3-none-any.whl")[-1].headers["Range"] == "bytes=100000-"


def test_a_server_without_ranges_starts_over(package: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after, package.knows_ranges = [100_000], False
    assert hub.resolve(SOURCE).read_bytes() == MODEL


@pytest.mark.parametrize("half", [b"?" * 100_000, b"?" * 2_000_000], ids=["damaged", "too long"])
def test_a_wrong_half_is_thrown_away(
    package: Server, monkeypatch: pytest.MonkeyPatch, cache: Path, half: bytes
) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    package.break_after = [100_000] + [0] * download.ATTEMPTS
    with pytest.raises(SourceError):
        hub.resolve(SOURCE)
    [part] = cache.rglob("*.part")
    part.write_bytes(half)
    assert hub.resolve(SOURCE).read_bytes() == MODEL


def test_a_lock_waits_for_its_holder(tmp_path: Path) -> None:
    with disk.lock(tmp_path / "lock"):
        file = f"Path({str(tmp_path / 'lock')!r})"
        program = f"from pathlib import Path; from edgelm import disk as d\nwith d.lock({file}): print('in')"
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=1.5)
    assert process.communicate(timeout=600)[0] == "in\n"
