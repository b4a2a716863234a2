"""The service without a model: which scans are kept and for how long, and the handling of errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from fastapi import Body, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.testclient import TestClient

from ctclip.cli.serve import _secret
from ctclip.errors import CtclipError, DataError
from ctclip.models.encoded import Encoded
from ctclip.serve.app import _while_connected, invalid
from ctclip.serve.errors import Refused, Unavailable
from ctclip.serve.guards import LONGEST_BODY, Guards
from ctclip.serve.memory import EncodedScan, Memory
from ctclip.serve.run import _socket
from ctclip.serve.service import KEPT, KEPT_RESULTS, MOST_DEATHS, Client, Service
from ctclip.serve.settings import Lifetime, Settings
from ctclip.serve.worker import alone


def encoded(batch: int = 1) -> Encoded:
    torch.manual_seed(batch)
    return Encoded(torch.rand(batch, 6, 4), (1, 2, 3), torch.rand(batch, 4), np.eye(4), None, torch.rand(batch, 5), torch.rand(batch, 6, 8))  # fmt: skip


def scan(lifetime: Lifetime = "room") -> EncodedScan:
    return EncodedScan(encoded(), None, None, lifetime)  # type: ignore[arg-type]


def kept(memory: Memory, names: str) -> str:
    def there(name: str) -> bool:
        with memory._lock:
            return name in memory._scans

    return "".join(name for name in names if there(name))


def test_a_scan_of_a_batch_is_that_scan_and_holds_no_other() -> None:
    together = encoded(3)
    one = alone(together, 1)
    for part, whole in zip(one, together, strict=True):
        if isinstance(whole, torch.Tensor):
            assert torch.equal(part, whole[1:2])
            assert part.untyped_storage().nbytes() == part.nbytes
    assert one.grid == together.grid


def test_what_was_asked_about_last_stays_and_one_question_is_always_answered() -> None:
    memory = Memory(2)
    for name in "ab":
        memory.add(name, scan())
    memory.get("a")
    memory.add("q", scan("answered"))
    memory.add("c", scan())
    assert kept(memory, "abcq") == "acq"
    for name in "defg":
        memory.add(name, scan())
    assert kept(memory, "abcdefgq") == "fgq"
    memory.add("s", scan("scored"))
    assert kept(memory, "s") == ""
    memory.forget("q")
    with pytest.raises(CtclipError, match="no longer in memory"):
        memory.get("q")


def test_a_cancelled_scan_is_not_kept_and_nothing_of_it_remains() -> None:
    memory = Memory(2)
    memory.begin("a")
    memory.forget("a")
    assert memory.cancelled("a")
    memory.add("a", scan())
    assert kept(memory, "a") == ""
    memory.finish("a")
    for name in map(str, range(100)):
        memory.begin(name)
        memory.add(name, scan())
        memory.finish(name)
        memory.forget(name)
    assert not memory._cancelled
    assert not memory._unfinished
    assert not memory._scans


def test_a_model_that_dies_while_it_loads_is_given_up() -> None:
    client, starts, failures = Client(Settings("m")), [], []
    client.start = lambda: starts.append(1)  # type: ignore[method-assign]
    client.when_failed = lambda: failures.append(client.failed)
    client._deliver({"ready": {}})
    client._ended()
    assert not client.started.is_set()
    client._deliver({"ready": {}})
    for _ in range(MOST_DEATHS + 1):
        client._ended()
    assert len(starts) == MOST_DEATHS + 1
    assert client.started.is_set()
    assert len(failures) == 1
    assert "is there enough memory" in str(failures[0])


@pytest.fixture
def service(tmp_path: Path) -> Service:
    service = Service(Settings("m", queue=200))
    service.folder = tmp_path
    return service


def test_a_long_queue_removes_no_finished_scan(service: Service) -> None:
    done = service.new()
    done.move("done")
    for _ in range(KEPT + 10):
        service.new()
    assert service.get(done.id) is done
    for busy in list(service.scans.values()):
        busy.move("done")
    service.new()
    assert done.id not in service.scans


@pytest.mark.parametrize("fault", [RuntimeError("secret"), PermissionError(13, "no", "/secret")])
def test_an_unexpected_fault_ends_the_wait(service: Service, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def broken(folder: Path) -> Path:
        raise fault

    async def sent() -> None:
        scan = service.new()
        service.begin(scan)
        await asyncio.wait_for(service.wait(scan), 5)

    monkeypatch.setattr("ctclip.serve.service.scan_in", broken)
    with pytest.raises(Refused, match="unexpected fault") as refused:
        asyncio.run(sent())
    assert "secret" not in str(refused.value)


def test_results_do_not_fill_the_disk(service: Service) -> None:
    scan = service.new()
    for number in range(KEPT_RESULTS + 5):
        scan.map_of(f"finding {number}").touch()
    scan.view.touch()
    scan.remove_old_results()
    assert len(list(scan.folder.glob("*-map.nii.gz"))) == KEPT_RESULTS
    assert scan.view.exists()
    assert scan.files.exists()


def request_whose_sender(receive: Callable[[], Awaitable[dict[str, Any]]]) -> Request:
    return Request({"type": "http", "method": "POST", "headers": []}, receive)  # type: ignore[arg-type]


def test_work_for_nobody_is_cancelled() -> None:
    async def hang_up() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def stay() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    ended = []

    async def work(seconds: float) -> dict[str, Any]:
        try:
            await asyncio.sleep(seconds)
            return {"answer": 1}
        finally:
            ended.append(seconds)

    with pytest.raises(Unavailable, match="disconnected"):
        asyncio.run(_while_connected(request_whose_sender(hang_up), work(60)))
    assert ended == [60]
    assert asyncio.run(_while_connected(request_whose_sender(stay), work(0))) == {"answer": 1}


@pytest.mark.parametrize(
    "body", [b'{"text": "\\ud800"}', b'{"text": NaN}', b'{"text": ""}', b"{}", b"[]", b"", b'{"text": 1e999}']
)
def test_a_request_that_is_invalid_is_answered_in_one_line(body: bytes) -> None:
    app = FastAPI()
    app.add_exception_handler(RequestValidationError, invalid)

    @app.post("/text")
    async def text(text: Annotated[str, Body(embed=True, min_length=1)]) -> str:
        return text

    answer = TestClient(app).post("/text", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("body")


@pytest.mark.parametrize("host", ["x" * 70, "a..b", "127.0.0.1\0", "é\ud800"])
def test_a_name_that_no_host_can_have_is_refused(host: str) -> None:
    with pytest.raises(DataError, match="cannot listen on this address"):
        _socket(host, 0)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_a_file_without_a_token_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(DataError, match="token: holds no token in UTF-8; write one into it"):
        _secret(tmp_path / "token")


def test_only_scans_may_be_large() -> None:
    app = FastAPI()
    app.add_middleware(Guards, settings=Settings("m", hosts=("Testserver",)))

    @app.post("/v1/{path:path}")
    async def size(request: Request) -> int:
        return len(await request.body())

    client = TestClient(app)
    large = bytes(LONGEST_BODY + 1)
    assert client.post("/v1/scans", content=large).json() == len(large)
    assert client.post("/v1/scans/x/text", content=large).status_code == 413
    assert client.post("/v1/scans/x/text", content=large[1:]).json() == LONGEST_BODY
    assert client.post("/v1/scans/x/text", content=iter([b"x"])).status_code == 411
    for length in ("²".encode("latin-1"), b"9" * 5000, b"-1"):
        assert client.post("/v1/scans", headers={b"content-length": length}).status_code == 413
    for origin in ("http://[", "http://testserver.evil"):
        assert client.post("/v1/scans", headers={"origin": origin}).status_code == 403
    assert client.post("/v1/scans", headers={"origin": "http://testserver"}).status_code == 200
