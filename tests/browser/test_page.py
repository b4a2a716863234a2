"""The page of `ctclip serve` in a real browser, as its users use it."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_serve import Served

pytestmark = pytest.mark.integration

WAIT = 60_000


@pytest.fixture
def page(browser: Any, looked_at: Served) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    made = context.new_page()
    made.faults = []
    made.elsewhere = []
    made.on("pageerror", lambda error: made.faults.append(str(error)))
    made.on("console", lambda message: made.faults.append(message.text) if message.type == "error" else None)
    made.on("request", lambda request: None if request.url.startswith((looked_at.address, "blob:", "data:")) else made.elsewhere.append(request.url))  # fmt: skip
    made.goto(looked_at.address)
    yield made
    assert made.elsewhere == []
    context.close()


@pytest.fixture(scope="module")
def scan(cohort: Path) -> Path:
    return sorted((cohort / "dataset").rglob("*.nii.gz"))[0]


def send(page: Any, scan: Path) -> None:
    page.set_input_files("#files", scan)
    arrived(page)


def arrived(page: Any) -> None:
    """Wait until the findings and the scan are on the page."""
    page.wait_for_selector("#findings tbody tr", timeout=WAIT)
    page.wait_for_selector("#viewer:not([hidden])", timeout=WAIT)
    page.wait_for_selector("#work", state="hidden", timeout=WAIT)


def bright_pixels(page: Any) -> int:
    """Pixels of the canvas that are not black or almost black."""
    return page.evaluate("""() => new Promise((done) => {
        const image = new Image();
        image.onload = () => {
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [image.width, image.height];
            const context = copy.getContext("2d");
            context.drawImage(image, 0, 0);
            const values = context.getImageData(0, 0, copy.width, copy.height).data;
            let count = 0;
            for (let i = 0; i < values.length; i += 4) if (values[i] > 60) count++;
            done(count);
        };
        image.src = viewer.picture();
    })""")


def test_a_scan_is_sent_scored_and_drawn(page: Any, scan: Path) -> None:
    send(page, scan)
    assert page.locator("#findings tbody tr:not(.apart)").count() == 18
    assert "Not for diagnosis" in page.inner_text("#notice")
    assert "synthetic" in page.inner_text("#notice")
    assert bright_pixels(page) > 5000
    assert page.faults == []


def test_keys_move_and_windows_change(page: Any, scan: Path) -> None:
    send(page, scan)
    page.focus("#canvas")
    # The first step also snaps to voxels.
    page.keyboard.press("PageUp")
    before = page.evaluate("viewer.at()")
    page.keyboard.press("PageUp")
    after = page.evaluate("viewer.at()")
    assert after[2] > before[2]
    assert after[:2] == pytest.approx(before[:2], abs=1e-3)
    lung = bright_pixels(page)
    page.keyboard.press("3")
    assert page.input_value("#window") == "-450,1050"
    assert bright_pixels(page) != lung
    page.keyboard.press("a")
    assert page.get_attribute("[data-plane=axial]", "aria-pressed") == "true"
    page.keyboard.press("+")
    assert page.is_visible("#whole")
    page.keyboard.press("0")
    assert page.is_hidden("#whole")
    # A window chosen with the right mouse button does not have the name of a preset.
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"], steps=3)
    page.mouse.up(button="right")
    page.wait_for_timeout(200)
    chosen = page.evaluate("document.getElementById('window').selectedOptions[0].textContent")
    assert re.match(r"by hand \(W \d+, L -?\d+\)", chosen)


def test_distances_are_those_between_the_points(page: Any, scan: Path) -> None:
    """With the mouse and with the keyboard, against the positions that the viewer gives for both ends; afterwards a click
    moves again."""
    send(page, scan)
    page.click("[data-plane=axial]")
    page.click("#ruler")
    box = page.locator("#canvas").bounding_box()
    ends = [(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"]) for share in (0.4, 0.6)]
    page.mouse.move(*ends[0])
    page.mouse.down()
    page.mouse.move(*ends[1], steps=3)
    page.mouse.up()
    page.wait_for_selector("#distance:has-text('measured')", timeout=WAIT)
    measured = float(page.inner_text("#distance").split(" mm")[0])
    page.click("#ruler")
    assert page.inner_text("#distance") == ""
    places = []
    for end in ends:
        page.mouse.click(*end)
        page.wait_for_timeout(100)
        places.append(page.evaluate("viewer.at()"))
    assert measured > 30
    assert math.dist(*places) == pytest.approx(measured, abs=0.2)
    page.keyboard.press("x")
    page.evaluate(f"viewer.to({places[0]})")
    assert float(page.inner_text("#distance").split(" mm")[0]) == pytest.approx(measured, abs=0.2)
    page.keyboard.press("x")
    assert page.inner_text("#distance") == ""


def test_the_position_is_that_of_the_scan(page: Any, scan: Path) -> None:
    """A point in RAS mm is where nibabel places it: its HU are those of the file."""
    import nibabel as nib
    import numpy as np

    send(page, scan)
    image = nib.load(scan)
    index = np.array(image.shape) // 3
    point = (image.affine @ [*index, 1])[:3]
    page.evaluate(f"viewer.to({point.tolist()})")
    said = page.inner_text("#place")
    expected = float(image.get_fdata()[tuple(index)])
    assert abs(float(re.match(r"(-?\d+) HU", said)[1]) - expected) <= 1
    letters = dict(zip("RLAPSI", (1, -1) * 3, strict=True))
    place = [letters[letter] * float(value) for letter, value in re.findall(r"([RLAPSI]) ([\d.]+)", said)]
    assert place == pytest.approx(tuple(point), abs=0.06)
    # The patient's right has positive x in RAS.
    assert ("R " in said) == (point[0] > 0)


def test_a_click_flies_to_the_peak_and_lays_the_map_over_the_scan(page: Any, scan: Path, looked_at: Served) -> None:
    send(page, scan)
    name = page.evaluate("scan")
    finding = page.inner_text("#findings .name >> nth=2")
    plain = page.evaluate("viewer.picture()")
    page.click("#findings .name >> nth=2")
    page.wait_for_selector("#clear:not([hidden])", timeout=WAIT)
    facts = looked_at.client.get(f"/v1/scans/{name}/explain", params={"finding": finding}).json()
    # The viewer's position snaps to voxels.
    spacing = 8
    assert page.evaluate("viewer.at()") == pytest.approx(facts["peak_mm_ras"], abs=spacing)
    assert finding in page.inner_text("#mapped")
    assert page.evaluate("viewer.picture()") != plain
    page.click("#clear")
    assert page.inner_text("#mapped") == ""


def test_a_draft_says_what_the_detector_says(page: Any, scan: Path, looked_at: Served) -> None:
    send(page, scan)
    assert page.locator("#sentences li").count() == 0
    draft = looked_at.client.get(f"/v1/scans/{page.evaluate('scan')}/draft").json()
    page.click("#draft")
    page.wait_for_selector("#sentences li", timeout=WAIT)
    assert draft["copied_from"]["volume"] in page.inner_text("#drafted")
    sentences = [*draft["findings"], *draft["impression"]]
    assert page.locator("#sentences li").count() == len(sentences)
    denied = [number for number, sentence in enumerate(sentences) if sentence["denied"]]
    assert 0 < len(denied) < len(sentences)
    assert page.locator("#sentences li.denied").count() == len(denied)
    assert "Denied: the detector calls" in page.inner_text(f"#sentences li >> nth={denied[0]}")
    finding = page.locator("#sentences button.claim").first
    finding.click()
    page.wait_for_selector("#clear:not([hidden])", timeout=WAIT)
    assert page.inner_text("#mapped").split(":")[0] in finding.inner_text()
    assert page.faults == []
    # When the user leaves a page, its scan is deleted.
    name = page.evaluate("scan")
    page.goto("about:blank")
    until = time.monotonic() + 30
    while looked_at.client.get(f"/v1/scans/{name}").status_code != 404:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_what_arrives_late_for_an_earlier_scan_is_dropped(page: Any, cohort: Path) -> None:
    """Of two scans sent one after the other, the page shows the last and keeps nothing of the first."""
    first, last = sorted((cohort / "dataset").rglob("*.nii.gz"))[:2]
    page.set_input_files("#files", first)
    page.wait_for_selector("#work:not([hidden])", timeout=WAIT)
    send(page, last)
    probabilities = page.inner_text("#findings")
    page.wait_for_timeout(500)
    assert page.inner_text("#findings") == probabilities
    assert page.is_hidden("#reason")


def test_an_upload_is_cancelled(page: Any, looked_at: Served, tmp_path: Path) -> None:
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 500_000}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    (tmp_path / "large.nii.gz").write_bytes(bytes(50_000_000))
    page.set_input_files("#files", tmp_path / "large.nii.gz")
    page.wait_for_selector("#work:not([hidden])", timeout=WAIT)
    page.click("#cancel")
    assert page.is_hidden("#work")
    assert page.is_hidden("#reason")
    until = time.monotonic() + 30
    while looked_at.uploads() and time.monotonic() < until:
        time.sleep(0.1)
    assert [path for path in looked_at.uploads() if "large" in path.name] == []


def test_free_text_is_scored(page: Any, scan: Path) -> None:
    send(page, scan)
    page.fill("#text", "a cyst in the left kidney")
    page.press("#text", "Enter")
    page.wait_for_selector("#asked tr", timeout=WAIT)
    assert "a cyst in the left kidney" in page.inner_text("#asked")


def test_a_stored_volume_and_its_neighbours(page: Any, looked_at: Served) -> None:
    volume = looked_at.client.get("/v1/models").json()["stored"][0]
    page.wait_for_selector("#stored:not([hidden])", timeout=WAIT)
    page.fill("#volume", volume)
    page.press("#volume", "Tab")
    page.wait_for_selector("#scans li", timeout=WAIT)
    assert volume.rsplit("_", 1)[0] in page.inner_text("#scans li >> nth=0")
    assert page.locator("#reports li").count() > 0


def test_a_scan_is_sent_shown_and_saved_with_the_keyboard_alone(page: Any, scan: Path, tmp_path: Path) -> None:
    def tab_to(selector: str) -> None:
        for _ in range(100):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"the Tab key does not lead to {selector}")

    # Without expect_file_chooser, which sometimes starts to listen only after the key.
    page.on("filechooser", lambda chooser: chooser.set_files(scan))
    tab_to("#files")
    page.keyboard.press("Enter")
    arrived(page)
    tab_to("#findings .name")
    page.keyboard.press("Enter")
    page.wait_for_selector("#clear:not([hidden])", timeout=WAIT)
    assert page.evaluate("document.activeElement.id") == "canvas"
    tab_to("[data-save='findings.csv']")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(tmp_path / "findings.csv")
    lines = (tmp_path / "findings.csv").read_text().strip().splitlines()
    assert lines[0].startswith("finding,probability")
    assert len(lines) == 19


def test_a_page_a_map_and_dicom_objects_are_saved(page: Any, scan: Path, tmp_path: Path) -> None:
    """The map can be downloaded only while one is on screen, DICOM objects only for a DICOM series."""
    import nibabel as nib

    from tests.phantom_dicom import write_series

    send(page, scan)
    assert page.is_hidden("[data-save='dicom.zip']")
    assert page.is_hidden("[data-save='map.nii.gz']")
    assert page.is_hidden("#deposit")
    write_series(scan, tmp_path / "series")
    page.set_input_files("#files", sorted((tmp_path / "series").iterdir()))
    page.wait_for_selector("[data-save='dicom.zip']:not([hidden])", timeout=WAIT)
    page.wait_for_selector("#work", state="hidden", timeout=WAIT)
    page.click("#findings .name >> nth=1")
    page.wait_for_selector("[data-save='map.nii.gz']:not([hidden])", timeout=WAIT)
    for name, start in (("findings.pdf", b"%PDF"), ("map.nii.gz", b"\x1f\x8b"), ("dicom.zip", b"PK")):
        with page.expect_download(timeout=WAIT) as download:
            page.click(f"[data-save='{name}']")
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert nib.load(tmp_path / "map.nii.gz").shape == nib.load(scan).shape
    page.click("#clear")
    assert page.is_hidden("[data-save='map.nii.gz']")
    assert page.faults == []


def drop(page: Any, path: Path) -> None:
    """Drop a file or folder as a file manager would."""
    session, box = page.context.new_cdp_session(page), page.locator("#drop").bounding_box()
    for kind in ("dragEnter", "dragOver", "drop"):
        at = {"x": box["x"] + 20, "y": box["y"] + 20}
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        session.send("Input.dispatchDragEvent", {"type": kind, **at, "data": data})


def test_a_folder_and_a_zip_are_dropped(page: Any, scan: Path, tmp_path: Path) -> None:
    from tests.phantom_dicom import write_series

    write_series(scan, tmp_path / "series")
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "series")
    drop(page, tmp_path / "series")
    arrived(page)
    of_folder = page.inner_text("#findings tbody")
    page.click("#remove")
    drop(page, Path(packed))
    arrived(page)
    assert page.inner_text("#findings tbody") == of_folder
    assert page.faults == []


def test_a_bad_file_is_one_line(page: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    page.set_input_files("#files", tmp_path / "bad.nii.gz")
    page.wait_for_selector("#reason:not([hidden])", timeout=WAIT)
    assert "bad.nii.gz" in page.inner_text("#reason")
    assert page.is_hidden("#work")


def test_two_users_at_once_see_their_own(browser: Any, looked_at: Served, cohort: Path) -> None:
    scans = sorted((cohort / "dataset").rglob("*.nii.gz"))[1:3]
    contexts = [browser.new_context() for _ in scans]
    pages = [context.new_page() for context in contexts]
    for one in pages:
        one.goto(looked_at.address)
    for one, path in zip(pages, scans, strict=True):
        one.set_input_files("#files", path)
    for one, path in zip(pages, scans, strict=True):
        one.wait_for_selector("#findings tbody tr", timeout=WAIT)
        answer = looked_at.client.post("/v1/detect", files={"scan": (path.name, path.read_bytes())}).json()
        first = answer["findings"][0]
        assert first["name"] in one.inner_text("#findings tbody tr >> nth=0")
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Any, looked_at: Served, scan: Path, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(looked_at.address)
    send(page, scan)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness > 200) == (scheme == "light")
    context.close()


class Fingers:
    """Touches on a page, as Chromium receives them from a screen; positions are those of the canvas."""

    def __init__(self, page: Any) -> None:
        page.locator("#canvas").scroll_into_view_if_needed()
        box = page.locator("#canvas").bounding_box()
        self.left, self.top, self.height = box["x"], box["y"], box["height"]
        self.page, self.session = page, page.context.new_cdp_session(page)

    def move(self, *paths: tuple[tuple[float, float], tuple[float, float]], steps: int = 10) -> None:
        """Each finger moves from the first to the second position of its path."""
        for step in range(steps + 1):
            points = [
                {"id": finger, "x": self.left + x + (to_x - x) * step / max(steps, 1), "y": self.top + y + (to_y - y) * step / max(steps, 1)}
                for finger, ((x, y), (to_x, to_y)) in enumerate(paths)
            ]  # fmt: skip
            self.send("touchMove" if step else "touchStart", points)
        self.send("touchEnd", [])
        self.page.wait_for_timeout(200)

    def send(self, kind: str, points: list[dict[str, float]]) -> None:
        self.session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_touch(browser: Any, looked_at: Served, scan: Path) -> None:
    """A tap and a drag move the crosshair, two fingers scroll or zoom, a finding is tapped; the page itself still scrolls."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(looked_at.address)
    send(page, scan)

    def place() -> list[float]:
        return page.evaluate("viewer.at()")

    fingers = Fingers(page)
    middle, window = place(), page.input_value("#window")
    fingers.move(((150, 70), (150, 70)), steps=0)
    tapped = place()
    assert math.dist(tapped, middle) > 10
    fingers.move(((150, 70), (190, 90)))
    dragged = place()
    # In the touched plane, towards the patient's left and posterior.
    assert dragged[0] < tapped[0] - 10
    assert dragged[1] < tapped[1] - 5
    assert dragged[2] == pytest.approx(tapped[2], abs=1e-3)
    fingers.move(((150, 100), (150, 40)), ((190, 100), (190, 40)))
    scrolled = place()
    assert abs(scrolled[2] - dragged[2]) > 5
    assert page.is_hidden("#whole")
    plain = page.evaluate("viewer.picture()")
    fingers.move(((150, 70), (110, 70)), ((190, 70), (230, 70)))
    assert place() == pytest.approx(scrolled, abs=1e-3)
    assert page.evaluate("viewer.picture()") != plain
    assert page.evaluate("visualViewport.scale") == 1
    page.tap("#whole")
    assert page.evaluate("viewer.picture()") == plain
    assert page.input_value("#window") == window

    page.evaluate("scrollTo(0, 0)")
    fingers.left, fingers.top = 0, 0
    fingers.move(((200, 250), (200, 20)), steps=20)
    assert page.evaluate("scrollY") > 100
    name, finding = page.evaluate("scan"), page.inner_text("#findings .name >> nth=2")
    page.tap("#findings .name >> nth=2")
    page.wait_for_selector("#clear:not([hidden])", timeout=WAIT)
    peak = looked_at.client.get(f"/v1/scans/{name}/explain", params={"finding": finding}).json()["peak_mm_ras"]
    assert place() == pytest.approx(peak, abs=8)
    box = page.locator("#canvas").bounding_box()
    assert -1 <= box["y"] < 844 - box["height"] + 1
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_of_accessibility(browser: Any, looked_at: Served, scan: Path, scheme: str) -> None:
    axe = Path(__file__).with_name("axe.min.js")
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(looked_at.address)
    send(page, scan)
    page.add_script_tag(path=axe)
    faults = page.evaluate("async () => (await axe.run()).violations")
    serious = [fault for fault in faults if fault["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(
        [[fault["id"], [node["html"][:80] for node in fault["nodes"]]] for fault in serious]
    )
    context.close()
