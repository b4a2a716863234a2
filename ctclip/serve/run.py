"""Start a service on an address."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import uvicorn

from ctclip.errors import DataError
from ctclip.inference.index import index_facts
from ctclip.models.folder import is_model_folder
from ctclip.preprocessing.store import VolumeStore
from ctclip.serve.app import make_app
from ctclip.serve.settings import Settings


def run(settings: Settings, host: str, port: int, certificate: Path | None, key: Path | None) -> None:
    """Serve until SIGINT or SIGTERM. Raises DataError if the address is in use or the certificate cannot be used, and
    CtclipError if the model, store or index is missing."""
    # Check what can be checked before the model is loaded.
    if settings.store is not None:
        VolumeStore(settings.store)
    if settings.index is not None:
        index_facts(settings.index)
    if Path(settings.model).is_dir() and not is_model_folder(Path(settings.model)):
        raise DataError(
            f"{settings.model}: not a model folder; training, `ctclip export` and `import-checkpoint` make one"
        )
    if certificate is not None and key is not None:
        _check_tls(certificate, key)
    listening = _socket(host, port)
    scheme = "https" if certificate else "http"
    print(
        f"serving on {scheme}://{host}:{listening.getsockname()[1]} (research software, not for diagnosis)", flush=True
    )
    app = make_app(settings)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5,
        ssl_certfile=certificate, ssl_keyfile=key, h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    server = uvicorn.Server(config)
    client = app.state.service.client
    client.when_failed = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listening])
    if client.failed:
        raise DataError(client.failed)


def _check_tls(certificate: Path, key: Path) -> None:
    for path in (certificate, key):
        if not path.is_file():
            raise DataError(f"{path}: no such file; give the certificate and its private key as PEM files")
    try:
        # An empty password, so that nobody is asked for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise DataError(
            f"{certificate}, {key}: not a certificate and its private key, as PEM files without a password "
            f"({getattr(error, 'reason', None) or error.strerror})"
        ) from error


def _socket(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        # From here on connections wait instead of being refused.
        listening.listen(2048)
    except (OSError, ValueError, TypeError) as error:
        # ValueError, TypeError: of a name that no host can have.
        reason = getattr(error, "strerror", None) or "not the name of a host"
        raise DataError(
            f"{host}:{port} cannot listen on this address ({reason}); give another --host or --port"
        ) from error
    return listening
