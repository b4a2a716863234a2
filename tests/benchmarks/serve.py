"""The service under load, and what a user of the page waits for: ``python -m tests.benchmarks.serve --demo runs/demo``.

Two hundred requests at once: are all answered, each with its own scan's findings, in how much memory? Then, one at a time:
free text, a stored volume, and, where a Chromium is installed, the first paint and a stored volume on the screen.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from datetime import date
from pathlib import Path

import httpx
import numpy as np

import ctclip
from tests.benchmarks.common import machine, table
from tests.browser.conftest import CHROMIUM, GRAPHICS
from tests.end_to_end.test_serve import Served, sent

SAME = 1e-5
TEXTS = 30
TIMES = 5
# The entry may be added later than the paint.
FIRST_PAINT = """() => new Promise((done) => new PerformanceObserver((list) => {
    for (const entry of list.getEntriesByName("first-contentful-paint")) done(entry.startTime);
}).observe({ type: "paint", buffered: true }))"""


def processes(service: Served) -> dict[str, int]:
    """Web process and model process, by their ids."""
    web = service.process.pid
    children = Path(f"/proc/{web}/task/{web}/children").read_text().split()
    model = next(pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
    return {"web": web, "model": int(model)}


def memory_gb(pid: int, what: str) -> float:
    """``what``: VmRSS, the present memory of a process, or VmHWM, its maximum."""
    return int(Path(f"/proc/{pid}/status").read_text().partition(f"{what}:")[2].split()[0]) / 2**20


async def at_once(address: str, scans: list[Path], count: int) -> list[tuple[float, httpx.Response | str]]:
    """Seconds and answer of each of ``count`` requests that are sent at the same time."""
    bodies = [sent(path) for path in scans]

    async def one(client: httpx.AsyncClient, number: int) -> tuple[float, httpx.Response | str]:
        began = time.perf_counter()
        try:
            answer: httpx.Response | str = await client.post("/v1/detect", files=bodies[number % len(bodies)])
        except httpx.HTTPError as error:
            answer = type(error).__name__
        return time.perf_counter() - began, answer

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        return list(await asyncio.gather(*(one(client, number) for number in range(count))))


def load(service: Served, model: Path, scans: list[Path], count: int) -> list[list[str]]:
    """The rows on ``count`` requests at once."""
    loaded = ctclip.load(model)
    expected = [loaded.detect(path).probabilities for path in scans]
    apart = min(distance(one, other) for i, one in enumerate(expected) for other in expected[:i])
    service.client.post("/v1/detect", files=sent(scans[0]))
    pids = processes(service)
    before = {name: memory_gb(pid, "VmRSS") for name, pid in pids.items()}
    began = time.perf_counter()
    answers = asyncio.run(at_once(service.address, scans, count))
    whole = time.perf_counter() - began
    lost = [answer for _, answer in answers if isinstance(answer, str) or answer.status_code != 200]
    mixed = 0
    for number, (_, answer) in enumerate(answers):
        if not isinstance(answer, str) and answer.status_code == 200:
            given = {entry["name"]: entry["probability"] for entry in answer.json()["findings"]}
            mixed += distance(given, expected[number % len(scans)]) > SAME
    seconds = np.array([each for each, _ in answers])
    assert apart > 10 * SAME, "the scans are too much alike to tell whether answers are mixed up"
    memory = ", ".join(f"{name} {before[name]:.2f} to {memory_gb(pid, 'VmHWM'):.2f}" for name, pid in pids.items())
    return [
        ["requests at once", f"{count}, of {len(scans)} scans"], ["lost", str(len(lost))], ["answered with another scan's findings", str(mixed)],
        ["seconds until answered: median, p95, last", ", ".join(f"{value:.1f}" for value in (np.median(seconds), np.quantile(seconds, 0.95), seconds.max()))],
        ["scans a second", f"{count / whole:.2f}"], ["GB of memory, before and at most", memory], ["files left on disk", str(len(service.uploads()))],
    ]  # fmt: skip


def distance(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference between two scans' probabilities."""
    return max(abs(one[name] - other[name]) for name in one)


def waits(service: Served) -> list[list[str]]:
    """The rows on the waiting times of one user, without a browser."""
    volume = service.client.get("/v1/models").json()["stored"][0]
    stored = []
    name = ""
    for _ in range(TIMES):
        began = time.perf_counter()
        name = service.client.post("/v1/scans", files={"volume": (None, volume)}).json()["scan"]
        service.client.get(f"/v1/scans/{name}/view.nii.gz").raise_for_status()
        # The view exists before the volume is encoded; the last event follows.
        service.client.get(f"/v1/scans/{name}/events").raise_for_status()
        stored.append(time.perf_counter() - began)
    texts = []
    for number in range(TEXTS):
        began = time.perf_counter()
        service.client.post(
            f"/v1/scans/{name}/text", json={"text": f"a cyst of {number} mm in the left kidney"}
        ).raise_for_status()
        texts.append(time.perf_counter() - began)
    return [
        ["stored volume encoded and fetched, s", spread(stored)],
        ["free text, the volume encoded, s", spread(texts)],
    ]


def seen(service: Served) -> list[list[str]]:
    """The rows on the page as a user sees it, in Chromium without a GPU."""
    from playwright.sync_api import sync_playwright

    volume = service.client.get("/v1/models").json()["stored"][0]
    paints, shown = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=GRAPHICS)
        for _ in range(TIMES):
            context = browser.new_context(viewport={"width": 1400, "height": 900})
            page = context.new_page()
            page.goto(service.address)
            page.wait_for_selector("#stored:not([hidden])", timeout=120_000)
            paints.append(page.evaluate(FIRST_PAINT) / 1000)
            began = time.perf_counter()
            page.fill("#volume", volume)
            page.press("#volume", "Tab")
            page.wait_for_selector("#viewer:not([hidden])", timeout=120_000)
            page.wait_for_selector("#work", state="hidden", timeout=120_000)
            shown.append(time.perf_counter() - began)
            context.close()
        browser.close()
    return [
        ["first paint of the page, s", spread(paints)],
        ["stored volume on the screen, s (software rendering)", spread(shown)],
    ]


def spread(values: list[float]) -> str:
    """Median and largest."""
    return f"median {np.median(values):.2f}, largest {max(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--scans", type=int, default=8)
    arguments = parser.parse_args()
    model, store = arguments.demo / "train" / "model", arguments.demo / "store"
    scans = sorted((arguments.demo / "cohort" / "dataset").rglob("*.nii.gz"))[: arguments.scans]
    print(f"{date.today()}, {machine()}, load of the machine {os.getloadavg()[1]:.0f}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        service = Served("--model", model, "--store", store, folder=Path(folder) / "tmp")
        print(table("Requests at once", ["", ""], load(service, model, scans, arguments.requests)), flush=True)
        print(table("One user", ["", ""], waits(service)), flush=True)
        if CHROMIUM:
            print(table("In a browser", ["", ""], seen(service)), flush=True)
        service.stop()


if __name__ == "__main__":
    main()
