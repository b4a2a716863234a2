"""`ctclip serve` as clients use it: a real process and real requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import ctclip
from ctclip.preprocessing.scratch import scratch_folder

from .conftest import run

pytestmark = pytest.mark.integration

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def model(trained: Path) -> Path:
    return trained / "model"


@pytest.fixture(scope="module")
def scans(cohort: Path) -> list[Path]:
    return sorted((cohort / "dataset").rglob("*.nii.gz"))


class Served:
    """A service in a separate process."""

    def __init__(self, *arguments: object, folder: Path, verify: ssl.SSLContext | bool = True) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "ctclip", "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "serving on" in line, line + self.process.stdout.read()
        self.address = line.split()[2]
        self.client = httpx.Client(base_url=self.address, timeout=120, verify=verify)
        self.wait()

    def wait(self) -> None:
        until = time.monotonic() + 300
        while self.client.get("/healthz").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.2)

    def uploads(self) -> list[Path]:
        """Files on disk that belong to the scans that were sent."""
        return [path for path in self.folder.rglob("*") if path.is_file() and "ctclip-serve" in str(path)]

    def stop(self) -> str:
        self.process.terminate()
        output, _ = self.process.communicate(timeout=60)
        return output


@pytest.fixture(scope="module")
def served(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    assert run("index", "--model", model, "--store", store, "--output", folder / "index").returncode == 0
    service = Served(
        "--model", model, "--store", store, "--index", folder / "index", "--largest-gb", "0.05", folder=folder / "tmp"
    )
    yield service
    service.stop()


def sent(path: Path) -> dict[str, tuple[str, bytes]]:
    return {"scan": (path.name, path.read_bytes())}


def test_what_is_answered_is_what_python_says(served: Served, model: Path, scans: list[Path]) -> None:
    loaded = ctclip.load(model)
    detection = loaded.detect(scans[0])
    answer = served.client.post("/v1/detect", files=sent(scans[0])).json()
    probabilities = {entry["name"]: entry["probability"] for entry in answer["findings"]}
    assert probabilities == pytest.approx(detection.probabilities, abs=1e-6)
    assert answer["model"] == detection.model
    assert "Not for diagnosis" in answer["notice"]
    assert any("synthetic" in warning for warning in answer["warnings"])
    vector = served.client.post("/v1/embed", files=sent(scans[0])).json()["embedding"]
    np.testing.assert_allclose(vector, loaded.embed(scans[0]), atol=1e-6)
    asked = served.client.post("/v1/detect", files=sent(scans[0]), data={"text": "a cyst in the left kidney"}).json()
    assert asked["name"] == "a cyst in the left kidney"
    assert asked["probability"] == pytest.approx(
        loaded.detect(scans[0], "a cyst in the left kidney").probabilities["a cyst in the left kidney"], abs=1e-6
    )
    drafted = served.client.post("/v1/draft", files=sent(scans[0])).json()
    assert drafted["method"] == "retrieval"
    assert drafted["copied_from"]["similarity"] > 0.999
    assert drafted["findings"][0]["text"]
    hits = served.client.post("/v1/similar", files=sent(scans[0]), data={"count": "3"}).json()
    assert len(hits["scans"]) == 3
    assert hits["scans"][0]["similarity"] > 0.999
    assert "patient" not in hits["scans"][0]
    assert served.uploads() == []


def test_a_scan_that_is_kept(served: Served, store: Path, scans: list[Path], tmp_path: Path) -> None:
    import nibabel as nib

    name = served.client.post("/v1/scans", files=sent(scans[1])).json()["scan"]
    stages = served.client.get(f"/v1/scans/{name}/events").text
    assert '"stage": "done"' in stages.strip().splitlines()[-1]
    (tmp_path / "view.nii.gz").write_bytes(served.client.get(f"/v1/scans/{name}/view.nii.gz").content)
    view = nib.load(tmp_path / "view.nii.gz")
    source = nib.as_closest_canonical(nib.load(scans[1]))
    np.testing.assert_allclose(nib.as_closest_canonical(view).affine, source.affine, atol=1e-3)
    assert "text/csv" in served.client.get(f"/v1/scans/{name}/findings.csv").headers["content-type"]
    assert served.client.post(f"/v1/scans/{name}/text", json={"text": "effusion"}).status_code == 200
    assert served.client.delete(f"/v1/scans/{name}").status_code == 204
    assert served.client.get(f"/v1/scans/{name}").status_code == 404
    assert served.uploads() == []


def test_where_a_finding_is_seen(served: Served, model: Path, scans: list[Path], tmp_path: Path) -> None:
    import nibabel as nib

    place = ctclip.load(model).explain(scans[0], "Pleural effusion")["Pleural effusion"]
    name = served.client.post("/v1/scans", files=sent(scans[0])).json()["scan"]
    finding = {"finding": "Pleural effusion"}
    assert served.client.get(f"/v1/scans/{name}/map.nii.gz", params=finding).status_code == 404
    answer = served.client.get(f"/v1/scans/{name}/explain", params=finding).json()
    assert answer["peak_mm_ras"] == pytest.approx(place.peak_ras, abs=0.11)
    (tmp_path / "map.nii.gz").write_bytes(served.client.get(f"/v1/scans/{name}/map.nii.gz", params=finding).content)
    heat = nib.load(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(heat.affine, nib.load(scans[0]).affine, atol=1e-3)
    np.testing.assert_allclose(
        heat.get_fdata(), np.clip(place.map(), 0, None).transpose(2, 1, 0), atol=float(place.map().max()) / 200
    )
    once = served.client.post("/v1/explain", files=sent(scans[0]), data=finding).json()
    assert once["peak_mm_ras"] == answer["peak_mm_ras"]
    words = served.client.get(f"/v1/scans/{name}/explain", params={"finding": "a cyst in the left kidney"}).json()
    assert words["finding"] == "a cyst in the left kidney"
    served.client.delete(f"/v1/scans/{name}")


def test_a_stored_volume_lies_as_its_file_does(served: Served, cohort: Path, tmp_path: Path) -> None:
    """The axes run to the same sides of the patient as in the scan, and the findings are on the same side."""
    import nibabel as nib
    from nibabel.processing import resample_from_to

    volume = served.client.get("/v1/models").json()["stored"][0]
    name = served.client.post("/v1/scans", files={"volume": (None, volume)}).json()["scan"]
    assert '"stage": "done"' in served.client.get(f"/v1/scans/{name}/events").text
    (tmp_path / "view.nii.gz").write_bytes(served.client.get(f"/v1/scans/{name}/view.nii.gz").content)
    view = nib.as_closest_canonical(nib.load(tmp_path / "view.nii.gz"))
    source = nib.as_closest_canonical(nib.load(next((cohort / "dataset").rglob(f"{volume}.nii.gz"))))
    # The store's grid is centred on the middle of the scan.
    middle = source.affine @ [*((np.array(source.shape) - 1) / 2), 1]
    affine = view.affine + np.outer([*middle[:3], 0], [0, 0, 0, 1])
    expected = resample_from_to(source, (view.shape, affine), order=1, cval=-1000).get_fdata()
    assert np.corrcoef(view.get_fdata().ravel(), expected.ravel())[0, 1] > 0.95
    place = served.client.get(f"/v1/scans/{name}/explain", params={"finding": "Pleural effusion"}).json()
    assert len(place["peak_mm_ras"]) == 3
    served.client.delete(f"/v1/scans/{name}")
    answer = served.client.post("/v1/detect", files={"volume": (None, "../../etc/passwd")})
    assert answer.status_code == 422
    assert "no such volume" in answer.json()["detail"]


def test_bad_scans_are_one_line(served: Served, tmp_path: Path) -> None:
    (tmp_path / "Doe^Jane.nii.gz").write_bytes(b"no scan at all")
    answer = served.client.post("/v1/detect", files=sent(tmp_path / "Doe^Jane.nii.gz"))
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert "\n" not in detail
    assert str(served.folder) not in detail
    # If several files were sent, the error names the folder.
    several = [("scan", (f"{number}.dcm", b"no slice")) for number in range(3)]
    answer = served.client.post("/v1/detect", files=several)
    assert answer.status_code == 422
    assert str(served.folder) not in answer.text
    assert served.client.post("/v1/detect", data={"x": "y"}).status_code == 400
    assert served.client.post("/v1/detect", json={"scan": "x"}).status_code == 400
    assert served.uploads() == []


def test_an_upload_beyond_the_limit_is_refused_before_it_is_stored(served: Served) -> None:
    address = served.client.base_url
    with socket.create_connection((address.host, address.port), 30) as connection:
        head = f"POST /v1/detect HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: 4000000000\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert served.uploads() == []
    # Without a stated length, stopped at the limit.
    body = (bytes(1_000_000) for _ in range(60))
    kind = {"content-type": "multipart/form-data; boundary=x"}
    with contextlib.suppress(httpx.WriteError):
        assert served.client.post("/v1/detect", content=body, headers=kind).status_code in (400, 413)
    assert served.uploads() == []


def test_other_hosts_and_other_pages_are_refused(served: Served) -> None:
    assert served.client.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
    assert served.client.post("/v1/scans", headers={"origin": "http://evil.example"}).status_code == 403
    assert served.client.get("/v1/models", headers={"origin": served.address}).status_code == 200


def test_figures_and_description(served: Served) -> None:
    figures = served.client.get("/metrics").text
    assert 'ctclip_scans_total{outcome="done"}' in figures
    assert "/v1/scans/{name}" in figures
    paths = served.client.get("/openapi.json").json()["paths"]
    assert {"/v1/detect", "/v1/embed", "/v1/similar", "/v1/models", "/healthz"} <= set(paths)


def test_many_at_once_are_each_answered_with_their_own(served: Served, model: Path, scans: list[Path]) -> None:
    """Findings and, for more scans than the service keeps, answers to a question."""
    loaded = ctclip.load(model)
    few, words = scans[:5], "a cyst in the left kidney"
    expected = [loaded.detect(path).probabilities for path in few]
    asked = [loaded.detect(path, words).probabilities[words] for path in few]

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.address, timeout=300) as client:
            bodies = [{"files": sent(few[n % 5]), "data": {"text": words} if n % 2 else None} for n in range(40)]
            return await asyncio.gather(*(client.post("/v1/detect", **body) for body in bodies))

    for number, answer in enumerate(asyncio.run(all_of_them())):
        assert answer.status_code == 200, answer.text
        if number % 2:
            assert answer.json()["probability"] == pytest.approx(asked[number % 5], abs=1e-5)
            continue
        probabilities = {entry["name"]: entry["probability"] for entry in answer.json()["findings"]}
        assert probabilities == pytest.approx(expected[number % 5], abs=1e-5)
    assert served.uploads() == []


def test_the_death_of_the_model_is_a_503_and_the_next_request_works(served: Served, scans: list[Path]) -> None:
    name = served.client.post("/v1/scans", files=sent(scans[0])).json()["scan"]
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
    worker = next(pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(int(worker), signal.SIGKILL)
    last = served.client.get(f"/v1/scans/{name}/events").text.strip().splitlines()[-1]
    assert '"stage": "refused"' in last or '"stage": "done"' in last
    answer = served.client.post("/v1/detect", files=sent(scans[0]))
    assert answer.status_code in (200, 503)
    assert served.client.post("/v1/detect", files=sent(scans[0])).status_code == 200
    assert "ctclip_worker_restarts_total 1.0" in served.client.get("/metrics").text


def test_a_killed_service_leaves_no_process_and_the_next_removes_its_uploads(served: Served) -> None:
    """The last test that uses this service."""
    address = served.client.base_url
    head = f"POST /v1/detect HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: 100000\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    head += '--x\r\nContent-Disposition: form-data; name="scan"; filename="a.nii.gz"\r\n\r\n'
    with socket.create_connection((address.host, address.port), 30) as connection:
        connection.sendall(head.encode() + bytes(50_000))
        until = time.monotonic() + 60
        while not served.uploads():
            assert time.monotonic() < until
            time.sleep(0.05)
        children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
        served.process.kill()
        served.process.wait()
    assert len(children) >= 1
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert served.uploads()
    # The first thing that the next service with this TMPDIR does.
    with scratch_folder("ctclip-serve-", parent=served.folder):
        assert len(list(served.folder.glob("ctclip-serve-*"))) == 1
    assert served.uploads() == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_with_tls_a_token_is_asked_for_and_nothing_is_left_or_logged(
    model: Path, scans: list[Path], tmp_path: Path
) -> None:
    """The certificate is made with OpenSSL; a client that does not trust it, and a client without TLS, get no
    answer."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    (tmp_path / "token").write_text("secret\n")
    arguments = ("--token-file", tmp_path / "token", "--tls-certificate", certificate, "--tls-key", key)
    known = ssl.create_default_context(cafile=str(certificate))
    service = Served("--model", model, *arguments, folder=tmp_path / "tmp", verify=known)
    assert service.address.startswith("https://")
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{service.address}/healthz")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{service.address}/healthz".replace("https", "http"))
    path = tmp_path / "Doe^Jane.nii.gz"
    path.write_bytes(scans[0].read_bytes())
    assert service.client.get("/v1/models").status_code == 401
    bearer = {"authorization": "Bearer secret"}
    assert service.client.post("/v1/detect", files=sent(path), headers=bearer).status_code == 200
    assert service.client.get("/", headers={}).status_code == 200
    output = service.stop()
    assert "Doe" not in output
    assert service.uploads() == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "MODEL", "--store", "nowhere"], "not a volume store"),
        (["--model", "MODEL", "--index", "nowhere"], "nowhere"),
        (["--model", "MODEL", "--tls-key", "key.pem"], "go together"),
        (["--model", "MODEL", "--tls-certificate", "no.pem", "--tls-key", "no.pem"], "no.pem"),
        (["--model", "MODEL", "--tls-certificate", __file__, "--tls-key", __file__], "certificate"),
    ],
)
def test_bad_arguments_are_one_line(model: Path, arguments: list[str], reason: str) -> None:
    done = run("serve", "--port", "0", *[str(model) if word == "MODEL" else word for word in arguments])
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
