"""`ctclip serve`: a page to look at scans, and an HTTP interface to call."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.reading import EXPECT, GEOMETRY, HU, LARGEST_GB, SERIES, Expected, Geometry, Trusted, reading_of


def serve(
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a hub name."),
    store: Path = typer.Option(None, help="A store of `ctclip preprocess`, whose volumes the page offers."),
    index: Path = typer.Option(None, help="Folder of `ctclip index`: similar scans with their reports."),
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on. Others than this machine can reach it only if you say so."
    ),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on."),
    name: list[str] = typer.Option(
        None, help="Host names under which the service is reached, besides --host; may be repeated."
    ),
    token_file: Path = typer.Option(None, help="File with a token that every request must bear."),
    tls_certificate: Path = typer.Option(None, help="Certificate (PEM) for HTTPS; goes with --tls-key."),
    tls_key: Path = typer.Option(None, help="Private key (PEM) of the certificate."),
    queue: int = typer.Option(256, min=1, help="Scans that may wait at once; more are answered with 503."),
    keep: int = typer.Option(8, min=1, help="Encoded scans kept in memory for questions."),
    seconds: float = typer.Option(600, min=1, help="How long one scan may take."),
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
) -> None:
    """Look at scans in a browser, or send them over HTTP.

    `ctclip serve --model runs/demo/train/model --store runs/demo/store`, then open <http://127.0.0.1:8000>

    `curl -F scan=@scan.nii.gz http://127.0.0.1:8000/v1/detect`

    What is sent is deleted once it is answered, at the latest when the service ends. `/openapi.json` describes the interface.
    """
    from ctclip import distributed, extras
    from ctclip.errors import DataError
    from ctclip.serve.settings import Settings

    extras.check("serve")
    if index is not None:
        extras.check("index")
    if (tls_certificate is None) != (tls_key is None):
        raise DataError("--tls-certificate and --tls-key go together")
    token = token_file.read_text(encoding="utf-8").strip() if token_file is not None else None
    if token == "":
        raise DataError(f"{token_file}: holds no token")
    settings = Settings(
        model=model, store=store, index=index, device=str(distributed.device()),
        reading=reading_of(hu, geometry, expect, series, largest_gb), largest_gb=largest_gb, queue=queue, keep=keep,
        seconds=seconds, token=token, hosts=(*Settings.hosts, host, *(name or [])),
    )  # fmt: skip

    from ctclip.serve.run import run

    run(settings, host, port, tls_certificate, tls_key)
