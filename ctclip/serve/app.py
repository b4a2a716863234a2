"""The HTTP interface: routes that call the service and answer in JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ctclip import __version__, extras
from ctclip.preprocessing.errors import printable
from ctclip.preprocessing.whole_numbers import whole_number
from ctclip.serve import metrics
from ctclip.serve.errors import Refused, Unavailable, Unknown
from ctclip.serve.exports import table
from ctclip.serve.guards import Guards
from ctclip.serve.pacs import checked
from ctclip.serve.service import ENDED, Scan, Service
from ctclip.serve.settings import Settings
from ctclip.serve.uploads import BadUpload, TooLarge, TooSlow, receive

Method = Literal["learned", "similarity", "gradcam", "attention", "occlusion"]
Words = Annotated[str, Query(max_length=500)]
Several = Annotated[list[Words] | None, Query(max_length=100)]
STATIC = Path(__file__).with_name("static")
STATUS: dict[type[Exception], int] = {
    Refused: 422, Unavailable: 503, Unknown: 404, BadUpload: 400, TooLarge: 413, TooSlow: 408, extras.MissingExtra: 501,
}  # fmt: skip
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object",
    "properties": {
        "scan": {"type": "array", "items": {"type": "string", "format": "binary"},
                 "description": "A volume file, a zip, the files of a DICOM series, or a header with its data file."},
        "volume": {"type": "string", "description": "Instead of a file: a volume of the service's store."},
        "study": {"type": "string", "description": "Instead of a file, with `series`: UIDs of a series in the "
                                                   "service's PACS."},
        "series": {"type": "string", "description": "See `study`."},
        "text": {"type": "string", "description": "/v1/detect: score this text instead of the model's findings."},
        "finding": {"type": "string", "description": "/v1/explain: the finding, or any text, to locate."},
        "count": {"type": "integer", "description": "/v1/similar: the number of scans and of reports."},
    }}}}}}  # fmt: skip


def make_app(settings: Settings) -> FastAPI:
    """The ASGI application of a service."""
    service = Service(settings)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="ctclip",
        version=__version__,
        description="Findings of CT scans from a vision-language model. Research software, not a medical device.",
        lifespan=life,
        redoc_url=None,
        docs_url=None,
    )
    app.state.service = service
    app.add_middleware(Guards, settings=settings)
    for kind in STATUS:
        app.add_exception_handler(kind, _one_line)
    app.add_exception_handler(TimeoutError, _too_long)
    app.add_exception_handler(RequestValidationError, invalid)
    _add_page(app)
    _add_scans(app, service)
    _add_pacs(app, service)
    _add_one_call(app, service)
    _add_state(app, service)
    return app


async def _one_line(_: Request, error: Exception) -> Response:
    status = STATUS[type(error)]
    headers = {"retry-after": "5"} if status == 503 else {"connection": "close"} if status in (408, 413) else None
    return JSONResponse({"detail": str(error)}, status, headers)


async def _too_long(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "the request took too long"}, 504)


async def invalid(_: Request, error: Exception) -> Response:
    """The first fault of a request in one line. FastAPI's own answer quotes the value, which fails for NaN and for half of
    a surrogate pair."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    return JSONResponse({"detail": printable(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")}, 422)


async def _upload(request: Request, service: Service) -> tuple[Scan, dict[str, str]]:
    """Store the scan of a multipart body; return it with the other fields."""
    scan = service.new()
    try:
        fields = await receive(
            request.headers.get("content-type", ""), request.stream(), scan.files, service.settings.largest_bytes
        )
        scan.volume = fields.get("volume")
        if "study" in fields or "series" in fields:
            service.needed_pacs()
            scan.remote = checked(fields.get("study", "")), checked(fields.get("series", ""))
        elif scan.volume is None and not any(scan.files.iterdir()):
            raise BadUpload("no file in the upload: curl -F scan=@scan.nii.gz")
    except OSError as error:
        service.remove(scan)
        raise Unavailable(f"the upload cannot be stored ({error.strerror})") from error
    except BaseException:
        service.remove(scan)
        raise
    return scan, fields


async def _while_connected(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """The result of ``work``, which is cancelled if the client disconnects. The request body has already been read."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(until_gone())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Unavailable("the client has disconnected")
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.wait({working})


def _add_page(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")


def _add_scans(app: FastAPI, service: Service) -> None:
    """Routes for scans that are sent once and queried several times, as the page does."""

    @app.post("/v1/scans", status_code=202, openapi_extra=UPLOAD)
    async def send(request: Request) -> dict[str, Any]:
        """Send a scan, or name a volume of the store. Its progress is at `/v1/scans/{scan}/events`."""
        scan, _ = await _upload(request, service)
        service.begin(scan)
        return scan.facts()

    @app.get("/v1/scans/{name}")
    async def state(name: str) -> dict[str, Any]:
        """The stage of a scan, and its findings when it is done."""
        return service.get(name).facts()

    @app.delete("/v1/scans/{name}", status_code=204)
    async def remove(name: str) -> None:
        """Cancel the scan and delete it with all results."""
        service.remove(service.get(name))

    @app.get("/v1/scans/{name}/events")
    async def events(name: str) -> StreamingResponse:
        """Server-sent events: one per stage; the last holds the findings, or the reason for a refusal."""
        scan = service.get(name)

        async def stages() -> AsyncIterator[str]:
            while True:
                changed = scan.changed
                yield f"data: {json.dumps(scan.facts())}\n\n"
                if scan.stage in ENDED:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), 15)
                except TimeoutError:
                    yield ": still working\n\n"

        return StreamingResponse(stages(), media_type="text/event-stream")

    @app.get("/v1/scans/{name}/view.nii.gz")
    async def view(name: str) -> FileResponse:
        """The scan in HU, oriented, on its own grid (a stored volume: on the grid of the store); available from the
        stage `encoding` on."""
        scan = await service.wait(service.get(name), or_stage="encoding")
        return FileResponse(scan.view, media_type="application/gzip", filename="scan.nii.gz")

    @app.get("/v1/scans/{name}/findings.csv")
    async def findings(name: str) -> Response:
        """The findings as a table."""
        scan = await service.wait(service.get(name))
        return Response(
            table(scan.result),
            media_type="text/csv",
            headers={"content-disposition": "attachment; filename=findings.csv"},
        )

    @app.get("/v1/scans/{name}/findings.pdf")
    async def sheet(name: str, finding: Words = "") -> FileResponse:
        """One page to print: the findings, and the location of `finding` or of any text."""
        scan = service.get(name)
        path = scan.made_of([finding], "findings.pdf")
        await service.ask(scan, "sheet", finding=finding, name=scan.volume or "", to=str(path))
        return FileResponse(path, media_type="application/pdf", filename="findings.pdf")

    @app.get("/v1/scans/{name}/dicom.zip")
    async def dicom(name: str, finding: Several = None) -> FileResponse:
        """DICOM segmentation, structured report and images for an uploaded DICOM series: of each `finding`, or of the
        findings at or above their threshold. They contain the patient's name, as the series does."""
        extras.check("dicom")
        scan = service.get(name)
        path = scan.made_of(finding or [], "dicom.zip")
        await service.ask(scan, "dicom", findings=finding or [], to=str(path))
        return FileResponse(path, media_type="application/zip", filename="dicom.zip")

    @app.post("/v1/scans/{name}/text")
    async def text(name: str, text: Annotated[str, Body(embed=True, min_length=1, max_length=500)]) -> dict[str, Any]:
        """The score of any text."""
        answer: dict[str, Any] = await service.ask(service.get(name), "text", text=text)
        return answer

    @app.get("/v1/scans/{name}/explain")
    async def explain(name: str, finding: str, method: Method | None = None) -> dict[str, Any]:
        """Locate a finding, or any text: peak and size in mm, side. The map is then available at `map.nii.gz`. The
        default method is `learned` if the model has a locator, else `similarity`."""
        scan = service.get(name)
        answer: dict[str, Any] = await service.ask(scan, "explain", finding=finding[:500], method=method, map=str(scan.map_of(finding)))  # fmt: skip
        return answer

    @app.get("/v1/scans/{name}/map.nii.gz")
    async def heat(name: str, finding: str) -> FileResponse:
        """The map that `explain` computed, on the grid of the scan's own file."""
        path = service.get(name).map_of(finding)
        if not path.is_file():
            raise Unknown("there is no map of this finding; request /v1/scans/{scan}/explain first")
        return FileResponse(path, media_type="application/gzip", filename="map.nii.gz")

    @app.get("/v1/scans/{name}/similar")
    async def similar(name: str, count: int = 5) -> dict[str, Any]:
        """The nearest scans and reports of the index."""
        answer: dict[str, Any] = await service.ask(service.get(name), "similar", count=min(max(count, 1), 50))
        return answer

    @app.get("/v1/scans/{name}/draft")
    async def draft(name: str) -> dict[str, Any]:
        """The draft of a report: each sentence with its claims and the detector's probability of each. The draft is
        written by the model's caption head or, without one, copied from the report of the nearest scan in the index."""
        answer: dict[str, Any] = await service.ask(service.get(name), "draft")
        return answer


def _add_pacs(app: FastAPI, service: Service) -> None:
    """Routes for the PACS that the service was started with."""

    @app.get("/v1/dicomweb/series")
    async def series(study: str) -> list[dict[str, Any]]:
        """The CT series of a study in the PACS. Send the UIDs of one as `study` and `series` to load it."""
        return await asyncio.to_thread(service.needed_pacs().series, study)

    @app.post("/v1/scans/{name}/dicomweb")
    async def store(name: str, finding: Several = None) -> dict[str, int]:
        """Store the segmentation, report and images of `dicom.zip` in the PACS."""
        return {"stored": await service.send_to_pacs(service.get(name), finding or [])}


def _add_one_call(app: FastAPI, service: Service) -> None:
    """Routes that take a scan and give one answer; nothing is kept."""

    async def answer(request: Request, task: str) -> dict[str, Any]:
        scan, fields = await _upload(request, service)
        try:
            if task == "detect" and "text" not in fields:
                return await _while_connected(request, scored(scan))
            return await _while_connected(request, asked(scan, "text" if task == "detect" else task, fields))
        finally:
            service.remove(scan)

    async def scored(scan: Scan) -> dict[str, Any]:
        service.begin(scan, "scored")
        return (await service.wait(scan)).facts()

    async def asked(scan: Scan, question: str, fields: dict[str, str]) -> dict[str, Any]:
        given: dict[str, dict[str, Any]] = {
            "text": {"text": fields.get("text")},
            "similar": {"count": _count(fields)},
            "explain": {"finding": fields.get("finding", ""), "method": None, "map": str(scan.map_of(""))},
        }
        async with service.questions:
            service.begin(scan, "answered")
            reply: dict[str, Any] = await service.ask(scan, question, **given.get(question, {}))
        return reply

    @app.post("/v1/detect", openapi_extra=UPLOAD)
    async def detect(request: Request) -> dict[str, Any]:
        """Findings of one scan."""
        return await answer(request, "detect")

    @app.post("/v1/explain", openapi_extra=UPLOAD)
    async def explain(request: Request) -> dict[str, Any]:
        """Locate a finding (field `finding`) in one scan."""
        return await answer(request, "explain")

    @app.post("/v1/embed", openapi_extra=UPLOAD)
    async def embed(request: Request) -> dict[str, Any]:
        """The unit vector of one scan."""
        return await answer(request, "embed")

    @app.post("/v1/draft", openapi_extra=UPLOAD)
    async def draft(request: Request) -> dict[str, Any]:
        """The draft of a report; see `/v1/scans/{name}/draft`."""
        return await answer(request, "draft")

    @app.post("/v1/similar", openapi_extra=UPLOAD)
    async def similar(request: Request) -> dict[str, Any]:
        """The nearest scans and reports of the index."""
        return await answer(request, "similar")


def _count(fields: dict[str, str]) -> int:
    return min(whole_number(fields.get("count", "")) or 5, 50)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, the data it was trained and calibrated on, and the volumes of the store."""
        await service.client.started.wait()
        if service.client.failed:
            raise Unavailable(service.client.failed)
        return {**(service.client.facts or {}), "dicomweb": service.pacs is not None}

    @app.get("/healthz")
    async def health() -> Response:
        """200 once the model is loaded."""
        if service.client.failed:
            return JSONResponse({"state": "failed"}, 503)
        ready = service.client.started.is_set()
        return JSONResponse({"state": "ready" if ready else "loading the model"}, 200 if ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def figures() -> Response:
        metrics.BUSY.set(service.busy)
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
