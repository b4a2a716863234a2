"""The scans of a service and its worker process: queue, progress, cancellation, and restart of the worker."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import multiprocessing
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ctclip.errors import CtclipError
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.serve import metrics
from ctclip.serve.errors import Refused, Unavailable, Unknown
from ctclip.serve.pacs import Pacs
from ctclip.serve.settings import Lifetime, Settings

ENDED = ("done", "refused", "cancelled")
# Maximum number of finished scans that are remembered; more than the worker keeps in memory.
KEPT = 64
# Maximum number of results of a scan on disk: maps, pages, DICOM objects.
KEPT_RESULTS = 32
# Maximum number of unanswered requests to the worker.
MOST_QUESTIONS = 1000
# Maximum number of consecutive crashes of the worker before it has loaded the model.
MOST_DEATHS = 3


@dataclass
class Scan:
    """One scan of a user. ``stage``: receiving, queued, fetching, reading, encoding, done, refused or cancelled.
    ``remote``: UIDs of the study and the series to fetch from the PACS, or None; ``lifetime``: see ``settings``."""

    id: str
    folder: Path
    volume: str | None = None
    remote: tuple[str, str] | None = None
    lifetime: Lifetime = "room"
    stage: str = "receiving"
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def files(self) -> Path:
        """The folder of the upload."""
        return self.folder / "files"

    @property
    def view(self) -> Path:
        """The volume for a viewer: HU on the scan's own grid."""
        return self.folder / "view.nii.gz"

    def made_of(self, findings: Iterable[str], kind: str) -> Path:
        """The path of a result for findings (``kind``, such as "map.nii.gz"); the name does not reveal them."""
        return self.folder / f"{hashlib.sha256(repr(list(findings)).encode()).hexdigest()[:16]}-{kind}"

    def map_of(self, finding: str) -> Path:
        """The file of the map of a finding; its name does not reveal the finding."""
        return self.made_of([finding], "map.nii.gz")

    def remove_old_results(self) -> None:
        """Delete all but the newest results, so that many questions do not fill the disk."""
        with contextlib.suppress(OSError):
            results = sorted(self.folder.glob("*-*"), key=lambda path: path.stat().st_mtime)
            for old in results[: max(0, len(results) - KEPT_RESULTS)]:
                old.unlink()

    def facts(self) -> dict[str, Any]:
        """The scan as JSON."""
        return {"scan": self.id, "stage": self.stage} | ({"reason": self.reason} if self.reason else {}) | self.result

    def move(self, stage: str, reason: str = "") -> None:
        """Enter a stage and wake the requests that wait for it."""
        self.stage, self.reason = stage, reason
        self.changed.set()
        self.changed = asyncio.Event()


class Client:
    """The service's side of the worker process. Requests are numbered; each is answered or fails."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Temporary files of the worker; set before ``start``.
        self.scratch = Path()
        self.numbers = itertools.count(1)
        self.waiting: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self.facts: dict[str, Any] | None = None
        self.failed: str | None = None
        self.process: BaseProcess | None = None
        self.pipe: Connection | None = None
        self.started = asyncio.Event()
        self.stopping = False
        self.deaths = 0
        self.when_failed: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Start loading the model. ``started`` is set when it is loaded, or cannot be loaded (``failed``)."""
        from ctclip.serve.model_process import main

        # A worker that was killed may have left an unpacked scan.
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(mode=0o700)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=main, args=(theirs, self.settings, self.scratch), daemon=False, name="ctclip model"
        )
        self.process.start()
        theirs.close()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(self.pipe, loop), daemon=True).start()

    def stop(self) -> None:
        """The worker ends when its pipe closes."""
        self.stopping = True
        if self.pipe is not None:
            self.pipe.close()
        if self.process is not None:
            self.process.join(5)
            if self.process.is_alive():
                self.process.kill()

    @contextlib.asynccontextmanager
    async def request(self, **request: Any) -> Any:
        """Send a request and return the queue of its messages. Waits until the model is loaded."""
        await self.started.wait()
        if self.failed or self.pipe is None:
            raise Unavailable(self.failed or "the service is stopping")
        number = next(self.numbers)
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.waiting[number] = messages
        try:
            self.pipe.send({"request": number, **request})
            yield messages
        except OSError as error:
            raise Unavailable("the model's process ended and is being restarted; send the request again") from error
        finally:
            del self.waiting[number]

    async def ask(self, **request: Any) -> Any:
        """Send a request and return its answer. Raises Refused with the reason, or Unavailable if the worker died."""
        async with self.request(**request) as messages:
            return result_of(await messages.get())

    def tell(self, **request: Any) -> None:
        """Send a request that has no answer."""
        if self.pipe is not None and self.started.is_set():
            with contextlib.suppress(OSError):
                self.pipe.send({"request": 0, **request})

    def _listen(self, pipe: Connection, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                break
            loop.call_soon_threadsafe(self._deliver, message)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._ended)

    def _deliver(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self.facts, self.deaths = message["ready"], 0
            self.started.set()
        elif "failed" in message:
            self._fail(message["failed"])
        elif message["request"] in self.waiting:
            self.waiting[message["request"]].put_nowait(message)

    def _ended(self) -> None:
        if self.stopping or self.failed:
            return
        for messages in self.waiting.values():
            messages.put_nowait({"died": True})
        self.deaths += not self.started.is_set()
        if self.deaths == MOST_DEATHS:
            self._fail(
                f"the model's process ended {MOST_DEATHS} times while it loaded the model; is there enough memory?"
            )
            return
        metrics.RESTARTS.inc()
        self.started.clear()
        self.start()

    def _fail(self, reason: str) -> None:
        self.failed = reason
        self.started.set()
        self.when_failed()


def result_of(message: dict[str, Any]) -> Any:
    """The result in a message of the worker. Raises Refused, or Unavailable."""
    if "died" in message:
        raise Unavailable("the model's process ended and is being restarted; send the request again")
    if "refused" in message:
        raise Refused(message["refused"])
    return message["result"]


class Service:
    """``scans``: by id. Uploads are in a temporary folder that is deleted with the service."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.scans: OrderedDict[str, Scan] = OrderedDict()
        self.client = Client(settings)
        self.folder = Path()
        self._open = contextlib.ExitStack()
        # Number of single-question scans in the worker at a time; others wait on disk.
        self.questions = asyncio.Semaphore(max(1, settings.keep // 2))
        self.pacs = Pacs(settings.dicomweb, settings.dicomweb_token) if settings.dicomweb else None

    async def start(self) -> None:
        """Create the folder and load the model in the background."""
        self.folder = self._open.enter_context(scratch_folder("ctclip-serve-"))
        self.client.scratch = self.folder / "worker"
        self.client.start()

    async def stop(self) -> None:
        """Stop the worker and delete all uploads."""
        for scan in self.scans.values():
            if scan.task is not None:
                scan.task.cancel()
        await asyncio.to_thread(self.client.stop)
        self._open.close()

    @property
    def busy(self) -> int:
        """Scans that have not ended."""
        return sum(scan.stage not in ENDED for scan in self.scans.values())

    def new(self, volume: str | None = None) -> Scan:
        """Add a scan. Raises Unavailable if the queue is full."""
        if self.busy >= self.settings.queue:
            raise Unavailable(f"{self.busy} scans are already waiting; try again later")
        name = secrets.token_urlsafe(12)
        scan = Scan(name, self.folder / name, volume)
        scan.files.mkdir(parents=True, mode=0o700)
        self.scans[name] = scan
        ended = [old for old in self.scans.values() if old.stage in ENDED]
        for old in ended[: max(0, len(ended) - max(KEPT, self.settings.keep))]:
            self.remove(old)
        return scan

    def get(self, name: str) -> Scan:
        """Raises Unknown."""
        if name not in self.scans:
            raise Unknown("no such scan: it was removed, or the service was restarted; send it again")
        return self.scans[name]

    def remove(self, scan: Scan) -> None:
        """Cancel work in progress, and delete the upload and its results."""
        if scan.task is not None and not scan.task.done():
            scan.task.cancel()
        self.client.tell(task="forget", scan=scan.id)
        shutil.rmtree(scan.folder, ignore_errors=True)
        self.scans.pop(scan.id, None)
        if scan.stage not in ENDED:
            scan.move("cancelled")

    def begin(self, scan: Scan, lifetime: Lifetime = "room") -> None:
        """Read and encode a scan; ``stage`` and ``changed`` report its progress."""
        scan.lifetime = lifetime
        scan.move("queued")
        scan.task = asyncio.create_task(self._work(scan))

    async def wait(self, scan: Scan, or_stage: str = "done") -> Scan:
        """Wait until a scan has ended, or is at the stage ``or_stage``. Raises Refused or Unavailable with the reason."""
        while scan.stage not in (*ENDED, or_stage):
            await scan.changed.wait()
        if scan.stage in ("done", or_stage):
            return scan
        raise (Unavailable if scan.result.get("again") else Refused)(scan.reason or "cancelled")

    async def ask(self, scan: Scan, task: str, **request: Any) -> Any:
        """Ask about an encoded scan."""
        await self.wait(scan)
        if len(self.client.waiting) > MOST_QUESTIONS:
            raise Unavailable("too many questions are waiting; try again later")
        scan.remove_old_results()
        return await asyncio.wait_for(self.client.ask(task=task, scan=scan.id, **request), self.settings.seconds)

    async def _work(self, scan: Scan) -> None:
        started = time.monotonic()
        try:
            if scan.remote is not None:
                scan.move("fetching")
                async with asyncio.timeout(self.settings.seconds):
                    await self._fetch(scan, *scan.remote)
            source: dict[str, Any] = {"volume": scan.volume} if scan.volume else {"path": str(scan_in(scan.files))}
            async with (
                asyncio.timeout(self.settings.seconds),
                self.client.request(
                    task="encode",
                    scan=scan.id,
                    lifetime=scan.lifetime,
                    folder=str(scan.files),
                    view=str(scan.view),
                    **source,
                ) as messages,
            ):
                while "stage" in (message := await messages.get()):
                    scan.move(message["stage"])
                scan.result = result_of(message)
            scan.move("done")
        except TimeoutError:
            self.client.tell(task="forget", scan=scan.id)
            scan.move("refused", f"it took longer than {self.settings.seconds:.0f} seconds")
        except Unavailable as error:
            scan.result = {"again": True}
            scan.move("refused", str(error))
        except CtclipError as error:
            scan.move("refused", str(error))
        except Exception as error:
            # Answer the waiting requests whatever the error is.
            scan.move("refused", f"an unexpected fault ({type(error).__name__})")
        finally:
            metrics.SCANS.labels(scan.stage).inc()
            metrics.SECONDS.observe(time.monotonic() - started)
            shutil.rmtree(scan.files, ignore_errors=True)

    async def send_to_pacs(self, scan: Scan, findings: list[str]) -> int:
        """Create the DICOM objects of a scan and store them in the PACS; return their number."""
        pacs = self.needed_pacs()
        path = scan.made_of(findings, "dicom.zip")
        await self.ask(scan, "dicom", findings=findings, to=str(path))
        return await asyncio.wait_for(asyncio.to_thread(pacs.store, path), self.settings.seconds)

    def needed_pacs(self) -> Pacs:
        """The PACS. Raises Refused if the service was started without one."""
        if self.pacs is None:
            raise Refused("the service was started without a PACS: start it with --dicomweb")
        return self.pacs

    async def _fetch(self, scan: Scan, study: str, series: str) -> None:
        cancelled = threading.Event()
        try:
            await asyncio.to_thread(
                self.needed_pacs().fetch, study, series, scan.files, self.settings.largest_bytes, cancelled
            )
        finally:
            # A thread cannot be stopped from outside.
            cancelled.set()


def scan_in(folder: Path) -> Path:
    """The scan in a folder of uploaded files: the one file, the header of a pair, or the folder (a DICOM series)."""
    files = sorted(folder.iterdir())
    if len(files) == 1:
        return files[0]
    headers = [path for path in files if path.suffix.lower() in (".mhd", ".nhdr", ".hdr")]
    return headers[0] if len(headers) == 1 else folder
