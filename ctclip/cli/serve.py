"""`ctclip serve`: a web page for viewing scans, and an HTTP interface."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from ctclip.cli.reading import (
    EXPECT,
    GEOMETRY,
    HU,
    LARGEST_GB,
    PRECISION,
    SERIES,
    Expected,
    Geometry,
    Precision,
    Trusted,
    reading_of,
)
from ctclip.cli.unused import refuse_unused


def serve(
    context: typer.Context,
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    store: Path = typer.Option(None, help="A store written by `ctclip preprocess`; the page offers its volumes."),
    index: Path = typer.Option(
        None, help="The folder written by `ctclip index`; adds similar scans and their reports."
    ),
    host: str = typer.Option(
        "127.0.0.1",
        help="Address to listen on. The default can be reached from this machine only; 0.0.0.0 listens on all interfaces.",
    ),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on."),
    host_name: list[str] = typer.Option(
        None, help="A host name that clients may use for the service, besides --host. May be repeated."
    ),
    token_file: Path = typer.Option(None, help="A file that holds a token; every request must send it."),
    tls_certificate: Path = typer.Option(None, help="Certificate (PEM) for HTTPS; needs --tls-key."),
    tls_key: Path = typer.Option(None, help="Private key (PEM) of the certificate; needs --tls-certificate."),
    dicomweb: str = typer.Option(
        None,
        help="Address of a DICOMweb service (a PACS), such as http://127.0.0.1:8042/dicom-web. Series are read from it by "
        "their UIDs, and results can be stored in it.",
    ),
    dicomweb_token_file: Path = typer.Option(None, help="A file that holds a bearer token for the DICOMweb service."),
    queue: int = typer.Option(
        256, min=1, help="Maximum number of scans in progress; further ones are answered with 503."
    ),
    keep_scans: int = typer.Option(8, min=1, help="Number of encoded scans kept in memory for questions."),
    seconds: float = typer.Option(600, min=1, help="Maximum time for one scan, in seconds."),
    precision: Precision = PRECISION,
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
) -> None:
    """View scans in a browser, or send them over HTTP.

    `ctclip serve --model runs/demo/train/model --store runs/demo/store`, then open <http://127.0.0.1:8000>

    `curl -F scan=@scan.nii.gz http://127.0.0.1:8000/v1/detect`

    Uploads are deleted after the answer, at the latest when the service stops. `/openapi.json` describes the
    interface.
    """
    from ctclip import distributed, extras
    from ctclip.errors import DataError
    from ctclip.serve.settings import Settings

    extras.check("serve")
    if index is not None:
        extras.check("index")
    if (tls_certificate is None) != (tls_key is None):
        raise DataError("--tls-certificate and --tls-key go together")
    if dicomweb is None:
        refuse_unused(context, "needs --dicomweb", "dicomweb_token_file")
    else:
        extras.check("dicom")
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", dicomweb):
            raise DataError(
                f"--dicomweb {dicomweb.rpartition('@')[2]}: expected http:// or https:// with a host and a path"
            )
    token, pacs_token = (_secret(path) for path in (token_file, dicomweb_token_file))
    settings = Settings(
        model=model, store=store, index=index, device=str(distributed.device()), precision=precision.value,
        reading=reading_of(hu, geometry, expect, series, largest_gb), largest_gb=largest_gb, queue=queue, keep=keep_scans,
        seconds=seconds, token=token, dicomweb=dicomweb.rstrip("/") if dicomweb else None, dicomweb_token=pacs_token, hosts=(*Settings.hosts, host, *(host_name or [])),
    )  # fmt: skip

    from ctclip.serve.run import run

    run(settings, host, port, tls_certificate, tls_key)


def _secret(path: Path | None) -> str | None:
    from ctclip.errors import DataError
    from ctclip.preprocessing.files import text_of

    if path is None:
        return None
    try:
        secret = text_of(path).strip()
    except UnicodeDecodeError:
        secret = ""
    if not secret:
        raise DataError(f"{path}: holds no token in UTF-8; write one into it")
    return secret
