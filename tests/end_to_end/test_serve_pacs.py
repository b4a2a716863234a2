"""`ctclip serve --dicomweb` with a real PACS, an Orthanc that the test starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import nibabel as nib
import pydicom
import pytest

from ctclip.cli import main
from ctclip.serve.errors import Refused, Unavailable
from ctclip.serve.pacs import Pacs, checked
from ctclip.serve.uploads import TooLarge
from tests.phantom_dicom import write_series
from tests.unit.preprocessing import dicom_builder

from .test_serve import Served, sent

pytestmark = pytest.mark.integration

pytest.importorskip("highdicom")
pytest.importorskip("dicomweb_client")
# Debian installs it where only root's PATH finds it.
ORTHANC = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PLUGIN = next(Path("/usr").glob("*/orthanc/plugins/libOrthancDicomWeb.so"), None)
SERIES, STUDY = dicom_builder.SERIES, dicom_builder.STUDY
PATIENT = {"PatientName": "Doe^Jane", "PatientID": "MRN4711", "SeriesDescription": "CHEST 5.0"}


class Orthanc:
    """A PACS in a temporary folder, reachable only from this machine."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {
            "Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": port,
            "DicomServerEnabled": False, "RemoteAccessAllowed": False, "AuthenticationEnabled": False,
            "Plugins": [str(PLUGIN)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(settings))
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen([str(ORTHANC), folder / "orthanc.json"], stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.address = f"http://127.0.0.1:{port}/dicom-web"
        until = time.monotonic() + 60
        while True:
            try:
                assert self.client.get("/system").status_code == 200
                break
            except httpx.ConnectError:
                assert self.process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.2)

    def stored(self, modality: str) -> list[pydicom.Dataset]:
        """Every instance of one modality."""
        every = [self.client.get(f"/instances/{name}/file").content for name in self.client.get("/instances").json()]
        images = [pydicom.dcmread(pydicom.filebase.DicomBytesIO(content)) for content in every]
        return [image for image in images if image.Modality == modality]


@pytest.fixture(scope="module")
def orthanc(scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if ORTHANC is None or PLUGIN is None:
        pytest.skip("orthanc and orthanc-dicomweb are not installed")
    folder = tmp_path_factory.mktemp("orthanc")
    started = Orthanc(folder)
    for path in write_series(scan, folder / "series", **PATIENT).iterdir():
        assert started.client.post("/instances", content=path.read_bytes()).status_code == 200
    yield started
    started.process.terminate()
    started.process.wait(30)


@pytest.fixture(scope="module")
def scan(cohort: Path) -> Path:
    return min((cohort / "dataset").rglob("*.nii.gz"))


@pytest.fixture(scope="module")
def served(trained: Path, orthanc: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served") / "tmp"
    service = Served("--model", trained / "model", "--dicomweb", f"{orthanc.address}/", folder=folder)
    yield service
    assert "Doe" not in service.stop()
    assert service.uploads() == []


def of(study: str, series: str) -> dict[str, tuple[None, str]]:
    return {"study": (None, study), "series": (None, series)}


@pytest.mark.slow
def test_a_series_is_fetched_and_results_are_stored(served: Served, orthanc: Orthanc, scan: Path) -> None:
    assert served.client.get("/v1/models").json()["dicomweb"] is True
    listed = served.client.get("/v1/dicomweb/series", params={"study": STUDY}).json()
    assert [(one["series"], one["description"], one["images"]) for one in listed] == [
        (SERIES, "CHEST 5.0", nib.load(scan).shape[2])
    ]
    name = served.client.post("/v1/scans", files=of(STUDY, SERIES)).json()["scan"]
    stages = served.client.get(f"/v1/scans/{name}/events").text
    assert '"stage": "done"' in stages.strip().splitlines()[-1]
    # Same as from the file itself, except for the rounding of stored values.
    fetched = served.client.get(f"/v1/scans/{name}").json()["findings"]
    direct = served.client.post("/v1/detect", files=sent(scan)).json()["findings"]
    expected = {entry["name"]: entry["probability"] for entry in direct}
    assert {e["name"]: e["probability"] for e in fetched} == pytest.approx(expected, abs=2e-3)
    stored = served.client.post(f"/v1/scans/{name}/dicomweb", params={"finding": "Pleural effusion"}).json()
    assert stored == {"stored": 3}
    (segments,) = orthanc.stored("SEG")
    (report,) = orthanc.stored("SR")
    (picture,) = orthanc.stored("OT")
    for made in (segments, report, picture):
        assert (made.StudyInstanceUID, made.PatientID) == (STUDY, "MRN4711")
    images = {image.SOPInstanceUID for image in orthanc.stored("CT")}
    assert {item.ReferencedSOPInstanceUID for item in segments.SourceImageSequence} == images
    assert len(orthanc.client.get("/studies").json()) == 1
    served.client.delete(f"/v1/scans/{name}")


@pytest.mark.slow
def test_a_detection_in_one_call(served: Served) -> None:
    answer = served.client.post("/v1/detect", files=of(STUDY, SERIES))
    assert answer.status_code == 200
    assert len(answer.json()["findings"]) == 18


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "series", "status"),
    [
        ("1.2.3", "1.2.3.4", 422),
        ("http://169.254.169.254/", "1.2", 422),
        ("1.2/../../instances", "1.2", 422),
        ("1.2", "1.2?x=http://evil.example", 422),
        ("", "", 422),
        ("1." * 40 + "1", "1.2", 422),
    ],
)
def test_nothing_but_a_uid_of_the_pacs(served: Served, study: str, series: str, status: int) -> None:
    answer = served.client.post("/v1/detect", files=of(study, series))
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert "UID" in detail or "no such study or series" in detail
    assert "http" not in detail
    assert served.uploads() == []


def test_a_series_beyond_the_limit(orthanc: Orthanc, tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        Pacs(orthanc.address, None).fetch(STUDY, SERIES, tmp_path, 100_000, threading.Event())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 300_000


def test_cancelling_ends_the_fetching(orthanc: Orthanc, tmp_path: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    Pacs(orthanc.address, None).fetch(STUDY, SERIES, tmp_path, 10**9, cancelled)
    assert list(tmp_path.iterdir()) == []


class Elsewhere(BaseHTTPRequestHandler):
    """A PACS that redirects to another address, and counts the requests there."""

    visits: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.visits.append(f"{self.path} {self.headers.get('Authorization')}")
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_redirections_are_not_followed(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Elsewhere.visits.clear()
    pacs = Pacs(f"http://127.0.0.1:{server.server_address[1]}/dicom-web", "secret")
    with pytest.raises(Refused, match="redirects to another address"):
        pacs.fetch("1.2.3", "1.2.4", tmp_path, 10**9, threading.Event())
    assert Elsewhere.visits == ["/dicom-web/studies/1.2.3/series/1.2.4 Bearer secret"]
    server.shutdown()
    server.server_close()
    with pytest.raises(Unavailable, match="cannot be reached"):
        pacs.fetch("1.2.3", "1.2.4", tmp_path, 10**9, threading.Event())


def test_uids() -> None:
    assert checked("1.2.840.10008") == "1.2.840.10008"
    for wrong in ("1", "1..2", "1.2.", "1.2\n", "1.2/3", "a.b", "", "١.٢", "1." * 32 + "1"):
        with pytest.raises(Refused):
            checked(wrong)


def test_an_address_is_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", str(tmp_path), "--dicomweb", "ftp://user:secret@host/x"]) == 2
    error = capsys.readouterr().err
    assert "expected http://" in error
    assert "secret" not in error
