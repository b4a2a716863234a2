"""A PACS over DICOMweb (PS3.18): fetch series from it (WADO-RS), and store DICOM objects in it (STOW-RS).

The service contacts only the address it was started with: requests contain only UIDs, and redirects are not followed.
"""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from ctclip.explanation.dicom.source import quiet
from ctclip.serve.errors import Refused, Unavailable
from ctclip.serve.uploads import MOST_FILES, TooLarge

# PS3.5, 9.1.
UID = re.compile(r"[0-9]+(\.[0-9]+)+")
LONGEST_UID = 64
SECONDS = 30


class Pacs:
    """One DICOMweb service. Raises Refused, or Unavailable if it cannot be reached; no message contains a UID."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url, self.token = url, token

    def series(self, study: str) -> list[dict[str, Any]]:
        """The CT series of a study: UID, number, description and count of images (QIDO-RS)."""
        entries = self._asked(
            lambda client: client.search_for_series(checked(study), search_filters={"Modality": "CT"})
        )
        return [
            {
                "series": _first(entry, "0020000E"), "number": _first(entry, "00200011"),
                "description": _first(entry, "0008103E"), "images": _first(entry, "00201209"),
            }
            for entry in entries
        ]  # fmt: skip

    def fetch(self, study: str, series: str, folder: Path, largest: int, cancelled: threading.Event) -> None:
        """Write the images of a series to ``folder``. Raises TooLarge if they exceed ``largest`` bytes."""

        def write(client: Any) -> int:
            size = count = 0
            kinds = (("application/dicom", "*"),)
            for count, image in enumerate(
                client.iter_series(checked(study), checked(series), media_types=kinds), start=1
            ):
                if cancelled.is_set():
                    break
                path = folder / f"{count:05d}.dcm"
                image.save_as(path, enforce_file_format=True)
                size += path.stat().st_size
                if size > largest or count > MOST_FILES:
                    raise TooLarge(f"the series is larger than {largest / 1e9:g} GB; --largest-gb raises the limit")
            return count

        if not self._asked(write) and not cancelled.is_set():
            raise Refused("the PACS has no such series")

    def store(self, archive: Path) -> int:
        """Store the DICOM files of a zip; return their number."""
        from pydicom import dcmread

        with zipfile.ZipFile(archive) as packed:
            objects = [dcmread(BytesIO(packed.read(name))) for name in packed.namelist()]
        answer = self._asked(lambda client: client.store_instances(objects))
        if failed := len(answer.get("FailedSOPSequence", [])):
            raise Refused(f"the PACS did not accept {failed} of {len(objects)} objects")
        return len(objects)

    def _asked(self, question: Callable[[Any], Any]) -> Any:
        import requests
        from dicomweb_client.web import DICOMwebClient

        with requests.Session() as session, quiet():
            # Ignore proxies and passwords of the environment, and do not follow redirects.
            session.trust_env, session.max_redirects = False, 0
            headers = {"Authorization": f"Bearer {self.token}"} if self.token else None
            client = DICOMwebClient(self.url, session, headers=headers, timeout=SECONDS)
            client.set_http_retry_params(retry=False)
            try:
                return question(client)
            except requests.HTTPError as error:
                status = error.response.status_code if error.response is not None else 0
                raise Refused(
                    "the PACS has no such study or series" if status == 404 else f"the PACS answered {status}"
                ) from None
            except requests.TooManyRedirects:
                raise Refused("the PACS redirects to another address; redirects are not followed") from None
            except (requests.RequestException, OSError):
                raise Unavailable("the PACS cannot be reached, or did not answer in time") from None
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Refused(f"the answer of the PACS is not DICOM ({type(error).__name__})") from None


def checked(uid: str) -> str:
    """Check a UID, which becomes part of a URL. Raises Refused for anything else."""
    if len(uid) > LONGEST_UID or not UID.fullmatch(uid):
        raise Refused("study and series are DICOM UIDs: digits and dots, at most 64")
    return uid


def _first(entry: dict[str, Any], tag: str) -> Any:
    return next(iter(entry.get(tag, {}).get("Value", [])), None)
