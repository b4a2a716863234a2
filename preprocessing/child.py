"""Decode in a child process, so that a library that crashes on damaged bytes crashes only the child.

One child is kept and reused. It has limits on memory and time and returns arrays in anonymous shared memory. If it
dies, a PreprocessingError is raised, and the next call starts a new child. Nothing that it returns is unpickled, so a
compromised decoder cannot reach this process.
"""

from __future__ import annotations

import atexit
import importlib
import json
import mmap
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from ctclip.preprocessing.errors import PreprocessingError

MEMORY_GB = 16.0
SECONDS = 600.0
LONGEST_REPLY = 1 << 20
LENGTH = struct.Struct("<Q")


def decode_in_child(
    function: str, *args: Any, source: str, seconds: float = SECONDS, memory_gb: float = MEMORY_GB
) -> tuple[np.ndarray, Any]:
    """Call ``function`` ("package.module:name") with ``args`` (picklable) in the child.

    The function returns an array, or an array and a JSON value; both are returned, the latter None if there is none.
    ``memory_gb`` bounds the child's address space, and ``seconds`` one call. A PreprocessingError of the function is
    raised here unchanged; any other failure becomes one that names ``source``.
    """
    with _LOCK:
        child = _child(memory_gb)
        try:
            return child.call(function, args, seconds)
        except TimeoutError as error:
            child.end()
            raise PreprocessingError(
                f"{source}: decoding took longer than {seconds:g} s; the file is damaged"
            ) from error
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            child.end()
            raise PreprocessingError(
                f"{source}: the decoder crashed; the file is damaged, or too large for memory"
            ) from error
        except _FailedError as failure:
            if failure.clear:
                raise PreprocessingError(failure.reason) from None
            raise PreprocessingError(f"{source}: cannot be decoded ({failure.reason}); it is damaged") from None
        except BaseException:
            # Interrupted between request and answer; the next call must not receive this answer.
            child.end()
            raise


class _FailedError(Exception):
    """The function raised in the child; ``clear``: its message can be shown unchanged."""

    def __init__(self, reason: str, clear: bool) -> None:
        super().__init__(reason)
        self.reason, self.clear = reason, clear


class _Child:
    """The child process and its socket."""

    def __init__(self, memory_gb: float) -> None:
        self.memory_gb, self.owner = memory_gb, os.getpid()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # Nothing is written to this pipe; it closes when this process ends.
        watched, kept = os.pipe()
        self.lifeline = os.fdopen(kept, "wb")
        with theirs, os.fdopen(watched, "rb"):
            # A new program instead of a fork inherits no locks or threads, and does not run the main module again.
            paths = [path or os.getcwd() for path in sys.path]
            start = f"import sys; sys.path[:] = {paths!r}; from {__package__}.child import main; "
            # -P: do not import from the working directory, which may contain untrusted files.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"{start}main({theirs.fileno()}, {watched}, {memory_gb!r})"],
                pass_fds=[theirs.fileno(), watched],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Libraries write messages to stderr that quote their input.
                stderr=subprocess.DEVNULL,
            )

    @property
    def alive(self) -> bool:
        # After a fork, this process is not the child's parent and shares its socket.
        return self.owner == os.getpid() and self.process.poll() is None

    def call(self, function: str, args: tuple[Any, ...], seconds: float) -> tuple[np.ndarray, Any]:
        until = time.monotonic() + seconds
        self.socket.settimeout(seconds)
        _send(self.socket, pickle.dumps((function, args)))
        content, descriptors = _receive(self.socket, until)
        try:
            reply = json.loads(content)
            if "failed" in reply:
                raise _FailedError(str(reply["failed"]), bool(reply["clear"]))
            return _mapped(descriptors[0], reply["shape"], reply["dtype"]), reply["extra"]
        except IndexError as error:
            raise EOFError from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def end(self) -> None:
        self.socket.close()
        self.lifeline.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


_LOCK = threading.Lock()
_KEPT: list[_Child] = []


def _child(memory_gb: float) -> _Child:
    if _KEPT and (not _KEPT[0].alive or _KEPT[0].memory_gb != memory_gb):
        _KEPT.pop().end()
    if not _KEPT:
        _KEPT.append(_Child(memory_gb))
    return _KEPT[0]


@atexit.register
def _end() -> None:
    while _KEPT:
        _KEPT.pop().end()


def _forked() -> None:
    # The child belongs to the parent: close the socket here, or the child would not notice the parent's end.
    global _LOCK
    _LOCK = threading.Lock()
    _end()


os.register_at_fork(after_in_child=_forked)


def _mapped(descriptor: int, shape: list[int], dtype: str) -> np.ndarray:
    """The array in shared memory, without a copy; the memory is freed with the array."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=object)) if shape else 1
    size = count * kind.itemsize
    if kind.kind not in "biuf" or min(shape, default=1) < 0 or size > os.fstat(descriptor).st_size:
        raise ValueError(shape)
    if size == 0:
        return np.empty(shape, kind)
    return np.frombuffer(mmap.mmap(descriptor, size), kind, count).reshape(shape)


def _send(connection: socket.socket, content: bytes, descriptors: list[int] | None = None) -> None:
    head = LENGTH.pack(len(content))
    if descriptors:
        socket.send_fds(connection, [head], descriptors)
    else:
        connection.sendall(head)
    connection.sendall(content)


def _receive(connection: socket.socket, until: float | None = None) -> tuple[bytes, list[int]]:
    """One message and the descriptors that came with it, by ``until`` (``time.monotonic``), or EOFError."""
    head, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 1)
    try:
        head += _bytes(connection, LENGTH.size - len(head), until) if head else b""
        (length,) = LENGTH.unpack(head) if head else (0,)
        if not head or (until is not None and length > LONGEST_REPLY):
            raise EOFError
        return _bytes(connection, length, until), descriptors
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _bytes(connection: socket.socket, length: int, until: float | None) -> bytes:
    content = bytearray()
    while len(content) < length:
        if until is not None:
            connection.settimeout(max(0.001, until - time.monotonic()))
        block = connection.recv(min(1 << 20, length - len(content)))
        if not block:
            raise EOFError
        content += block
    return bytes(content)


def _answer(connection: socket.socket, question: bytes) -> None:
    """Call the requested function and send the array, or the reason for a failure."""
    function, args = pickle.loads(question)
    try:
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(*args)
        array, extra = result if isinstance(result, tuple) else (result, None)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise TypeError(function)
        array = np.ascontiguousarray(array)
        reply = json.dumps({"shape": array.shape, "dtype": array.dtype.str, "extra": extra}).encode()
        descriptor = os.memfd_create("voxels")
        try:
            os.ftruncate(descriptor, array.nbytes)
            if array.nbytes:
                with mmap.mmap(descriptor, array.nbytes) as shared:
                    shared.write(array.data.cast("B"))
            _send(connection, reply, [descriptor])
        finally:
            os.close(descriptor)
    except PreprocessingError as error:
        _send(connection, json.dumps({"failed": str(error), "clear": True}).encode())
    except Exception as error:
        # Messages of libraries may quote the header, so only the type is passed on.
        _send(connection, json.dumps({"failed": type(error).__name__, "clear": False}).encode())


def _end_with_parent(watched: int) -> None:
    """Let the system end this process when the pipe ``watched`` closes, because a busy decoder would not notice."""
    import fcntl
    import select
    import signal

    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(watched, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([watched], [], [], 0)[0]:
        # The parent has already ended.
        os._exit(1)


def main(descriptor: int, watched: int, memory_gb: float) -> None:
    """The child: answer questions until the other end is closed."""
    import resource
    import signal

    _end_with_parent(watched)
    # Ctrl-C reaches the whole process group; the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit = int(memory_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=descriptor) as connection:
        while True:
            try:
                question, _ = _receive(connection)
            except (EOFError, OSError):
                return
            _answer(connection, question)
