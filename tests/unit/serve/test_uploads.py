"""Uploads are written unchanged, within their folder and limit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from ctclip.serve import uploads
from ctclip.serve.service import scan_in
from ctclip.serve.uploads import BadUpload, TooLarge, TooSlow, receive, safe_name


def body_of(files: list[tuple[str, bytes]], fields: dict[str, str] | None = None) -> tuple[str, bytes]:
    """Content type and body, made by httpx."""
    request = httpx.Request(
        "POST", "http://x", files=[("scan", (name, content)) for name, content in files], data=fields
    )
    return request.headers["content-type"], request.read()


def received(kind: str, body: bytes, folder: Path, piece: int = 1000, largest: int = 10**9) -> dict[str, str]:
    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), piece):
            yield body[start : start + piece]

    return asyncio.run(receive(kind, stream(), folder, largest))


@pytest.mark.parametrize("piece", [1, 7, 1000, 10**6])
def test_files_are_those_that_were_sent_however_the_body_is_cut(tmp_path: Path, piece: int) -> None:
    content = os.urandom(3000) + b"\r\n--boundary\r\n" + os.urandom(500)
    kind, body = body_of([("a.nii.gz", content), ("b.raw", b"")], {"text": "a cyst"})
    assert received(kind, body, tmp_path, piece) == {"text": "a cyst"}
    assert (tmp_path / "a.nii.gz").read_bytes() == content
    assert (tmp_path / "b.raw").read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\scans\\x.nii", "x.nii"),
        ("..", "scan"),
        ("", "scan"),
        (".bashrc", "bashrc"),
        ("Müller, Änne.nii.gz", "M_ller_nne.nii.gz"),
        ("a\0b\n.nii", "a_b_.nii"),
        ("x" * 300 + ".nii.gz", "x" * 113 + ".nii.gz"),
    ],
)
def test_names_cannot_leave_the_folder(name: str, kept: str) -> None:
    assert safe_name(name) == kept


def test_two_files_of_one_name_are_two_files(tmp_path: Path) -> None:
    kind, body = body_of([("A/IM1", b"first"), ("B/IM1", b"second")])
    received(kind, body, tmp_path)
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"first", b"second"]


def test_a_body_beyond_the_limit_ends_at_the_limit(tmp_path: Path) -> None:
    kind, body = body_of([("a.nii", bytes(100_000))])
    with pytest.raises(TooLarge, match="larger than"):
        received(kind, body, tmp_path, largest=50_000)
    assert (tmp_path / "a.nii").stat().st_size <= 50_000


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=other"])
def test_what_is_no_upload_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(BadUpload):
        received(kind, body_of([("a", b"x")])[1], tmp_path)


def test_a_body_that_ends_early_is_refused(tmp_path: Path) -> None:
    kind, body = body_of([("a.nii", bytes(5000))])
    with pytest.raises(BadUpload):
        received(kind, body[:3000], tmp_path)


@pytest.mark.parametrize(
    ("names", "scan"),
    [
        (["x.nii.gz"], "x.nii.gz"),
        (["x.mhd", "x.raw"], "x.mhd"),
        (["x.hdr", "x.img"], "x.hdr"),
        (["IM1", "IM2", "DICOMDIR"], "."),
    ],
)
def test_the_scan_among_its_files(tmp_path: Path, names: list[str], scan: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert scan_in(tmp_path) == tmp_path / scan


def test_fields_without_end_are_refused(tmp_path: Path) -> None:
    kind, body = body_of([("a", b"x")], {f"field {number}": "x" for number in range(30)})
    with pytest.raises(BadUpload, match="more than 20 fields"):
        received(kind, body, tmp_path)


@pytest.mark.parametrize(
    ("limit", "reason"), [("IDLE_SECONDS", "no data of the upload"), ("GRACE_SECONDS", "slower than 50 kB")]
)
def test_a_sender_that_keeps_the_service_waiting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str
) -> None:
    kind, body = body_of([("a.nii", bytes(5000))])
    monkeypatch.setattr(uploads, limit, 0.05)

    async def slow() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 500):
            await asyncio.sleep(0.02 if limit == "GRACE_SECONDS" else 1)
            yield body[start : start + 500]

    with pytest.raises(TooSlow, match=reason):
        asyncio.run(receive(kind, slow(), tmp_path, 10**9))
