"""Downloads from `ctclip serve`, as clients get them."""

from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from ctclip.serve.exports import table
from tests.phantom_dicom import write_series

from .test_serve import Served, sent

pytestmark = pytest.mark.integration

hd = pytest.importorskip("highdicom")
PATIENT = {"PatientName": "Doe^Jane", "PatientID": "MRN4711"}


@pytest.fixture(scope="module")
def served(trained: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    service = Served("--model", trained / "model", "--store", store, folder=tmp_path_factory.mktemp("served") / "tmp")
    yield service
    output = service.stop()
    assert "Doe" not in output
    assert service.uploads() == []


@pytest.fixture(scope="module")
def scan(cohort: Path) -> Path:
    return min((cohort / "dataset").rglob("*.nii.gz"))


@pytest.fixture(scope="module")
def series(served: Served, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of a DICOM series that was sent as separate files."""
    folder = write_series(scan, tmp_path_factory.mktemp("dicom") / "series", **PATIENT)
    files = [("scan", (path.name, path.read_bytes())) for path in folder.iterdir()]
    name: str = served.client.post("/v1/scans", files=files).json()["scan"]
    assert '"stage": "done"' in served.client.get(f"/v1/scans/{name}/events").text
    return name


def test_cells_that_a_spreadsheet_would_compute() -> None:
    names = ["=HYPERLINK(1)", "+SUM(A1)", "-A1", "@SUM(A1)", 'a "quoted", one', "Lung nodule"]
    entry = {"probability": 0.5, "interval": None, "margin": -1.0, "threshold": None}
    written = table({"findings": [{"name": name, **entry} for name in names], "model": "m"})
    lines = list(csv.reader(io.StringIO(written)))[1:]
    assert [line[0] for line in lines] == [*(f"'{name}" for name in names[:4]), *names[4:]]
    assert {(line[2], line[4]) for line in lines} == {("", "-1.0")}


def test_dicom_objects_of_a_series(served: Served, series: str, scan: Path, tmp_path: Path) -> None:
    assert served.client.get(f"/v1/scans/{series}").json()["dicom"] is True
    asked = {"finding": ["Pleural effusion", "Lung nodule"]}
    answer = served.client.get(f"/v1/scans/{series}/dicom.zip", params=asked)
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["segmentation.dcm", "report.dcm", "picture-01.dcm", "picture-02.dcm"]
        archive.extractall(tmp_path)
    segments = hd.seg.segread(tmp_path / "segmentation.dcm")
    assert [item.SegmentLabel for item in segments.SegmentSequence] == asked["finding"]
    assert segments.PatientID == "MRN4711"
    assert (segments.Rows, segments.Columns) == nib.load(scan).shape[1::-1]
    report = hd.sr.srread(tmp_path / "report.dcm").content
    assert len(report.get_volumetric_roi_measurement_groups()) + len(report.get_image_measurement_groups()) == 18
    # A text of the user.
    words = served.client.get(f"/v1/scans/{series}/dicom.zip", params={"finding": "a cyst in the left kidney"})
    with zipfile.ZipFile(io.BytesIO(words.content)) as archive:
        made = pydicom.dcmread(io.BytesIO(archive.read("segmentation.dcm")))
    assert made.SegmentSequence[0].SegmentLabel == "a cyst in the left kidney"


def test_findings_above_their_threshold_are_the_default(served: Served, series: str) -> None:
    """The model is not calibrated: no finding is above a threshold, and the report is the only object."""
    answer = served.client.get(f"/v1/scans/{series}/dicom.zip")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        facts = served.client.get(f"/v1/scans/{series}").json()
        above = [entry["name"] for entry in facts["findings"] if entry["above"]]
        expected = [
            *["segmentation.dcm"] * bool(above),
            "report.dcm",
            *(f"picture-{n + 1:02d}.dcm" for n in range(len(above))),
        ]
        assert archive.namelist() == expected


def test_what_is_no_series_has_no_dicom_objects(served: Served, scan: Path) -> None:
    name = served.client.post("/v1/scans", files=sent(scan)).json()["scan"]
    answer = served.client.get(f"/v1/scans/{name}/dicom.zip")
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(f"{scan.name}: not a DICOM series")
    assert served.client.get(f"/v1/scans/{name}").json()["dicom"] is False
    served.client.delete(f"/v1/scans/{name}")


def test_the_printed_page(served: Served, series: str) -> None:
    for finding in ("", "Pleural effusion"):
        page = served.client.get(f"/v1/scans/{series}/findings.pdf", params={"finding": finding}).content
        assert page.startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", page)) == 1
        # A4 in points.
        width, height = (float(v) for v in re.search(rb"/MediaBox \[ *0 0 ([\d.]+) ([\d.]+)", page).groups())
        assert (width, height) == pytest.approx((595, 842), abs=2)
        streams = b"".join(inflated(part) for part in re.findall(rb"stream\r?\n(.*?)endstream", page, re.DOTALL))
        assert (b"/Subtype /Image" in page) == bool(finding)
        assert b"Doe" not in page + streams
        assert len(page) < 3_000_000


def test_a_service_without_a_pacs_says_so(served: Served) -> None:
    answer = served.client.post("/v1/detect", files={"study": (None, "1.2.3"), "series": (None, "1.2.4")})
    assert answer.status_code == 422
    assert "--dicomweb" in answer.json()["detail"]
    assert served.client.get("/v1/models").json()["dicomweb"] is False


def inflated(part: bytes) -> bytes:
    try:
        return zlib.decompress(part)
    except zlib.error:
        return b""


def test_two_pages_at_once_are_not_mixed_up(served: Served, series: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    findings = ["Pleural effusion", "Lung nodule"] * 2
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(
                lambda f: served.client.get(f"/v1/scans/{series}/dicom.zip", params={"finding": f}).content, findings
            )
        )
    for finding, answer in zip(findings, answers, strict=True):
        with zipfile.ZipFile(io.BytesIO(answer)) as archive:
            made = pydicom.dcmread(io.BytesIO(archive.read("segmentation.dcm")))
        assert [item.SegmentLabel for item in made.SegmentSequence] == [finding]
        assert np.unpackbits(np.frombuffer(made.PixelData, np.uint8)).any()
