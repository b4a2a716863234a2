"""The decoding child process: its results, and that any failure is reported in one line without ending this process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctclip.preprocessing import PreprocessingError, child
from ctclip.preprocessing.child import decode_in_child

HERE = "tests.unit.preprocessing.test_child"


# Functions that the child is asked to run.
def ramp(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.arange(np.prod(shape)).astype(dtype).reshape(shape)


def with_extra() -> tuple[np.ndarray, Any]:
    return np.ones((2, 3), np.int16)[:, ::-1], {"pid": os.getpid(), "slices": [1, 2]}


def crash() -> np.ndarray:
    ctypes.string_at(0)
    raise AssertionError


def die() -> np.ndarray:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hang() -> np.ndarray:
    time.sleep(60)
    raise AssertionError


def busy() -> np.ndarray:
    """Like a decoder in C that holds the GIL: no other thread of the child runs."""
    re.match("(a+)+b", "a" * 60)
    raise AssertionError


def fill_memory() -> np.ndarray:
    return np.ones(1 << 33, np.uint8)


def refuse() -> np.ndarray:
    raise PreprocessingError("a.dcm: not a CT")


def fail() -> np.ndarray:
    raise ValueError("PatientName Doe^Jane")


def no_array() -> Any:
    return object()


def pid() -> tuple[np.ndarray, int]:
    return np.zeros(1, np.uint8), os.getpid()


def call(name: str, *args: Any, **options: Any) -> tuple[np.ndarray, Any]:
    return decode_in_child(f"{HERE}:{name}", *args, source="scan.dcm", **options)


@pytest.mark.parametrize("dtype", ["i2", ">i2", "f4", "u1", "f8"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 4), (1,), (200, 256, 256)])
def test_arrays_come_back_as_they_are(shape: tuple[int, ...], dtype: str) -> None:
    array, extra = call("ramp", shape, dtype)
    assert extra is None
    assert array.dtype == np.dtype(dtype)
    assert np.array_equal(array, ramp(shape, dtype))


def test_it_is_kept_and_gives_what_json_can_hold_beside_the_array() -> None:
    array, extra = call("with_extra")
    assert np.array_equal(array, np.ones((2, 3)))
    assert extra["slices"] == [1, 2]
    assert extra["pid"] == call("pid")[1] != os.getpid()
    array[:] = 5
    assert (array == 5).all()


@pytest.mark.parametrize("how", ["crash", "die"])
def test_its_death_is_one_line_and_the_next_call_works(how: str) -> None:
    before = call("pid")[1]
    with pytest.raises(PreprocessingError, match=r"^scan\.dcm: the decoder crashed; the file is damaged"):
        call(how)
    assert call("pid")[1] != before


def test_it_is_bounded_in_time_and_memory() -> None:
    start = time.monotonic()
    with pytest.raises(PreprocessingError, match=r"longer than 0\.5 s"):
        call("hang", seconds=0.5)
    assert time.monotonic() - start < 5
    with pytest.raises(PreprocessingError, match="MemoryError"):
        call("fill_memory", memory_gb=4.0)


def test_only_clear_messages_are_passed_on() -> None:
    with pytest.raises(PreprocessingError, match=r"^a\.dcm: not a CT$"):
        call("refuse")
    with pytest.raises(PreprocessingError) as refused:
        call("fail")
    assert str(refused.value) == "scan.dcm: cannot be decoded (ValueError); it is damaged"
    with pytest.raises(PreprocessingError, match="cannot be decoded"):
        call("no_array")


def test_one_that_was_killed_while_idle_is_replaced() -> None:
    os.kill(call("pid")[1], signal.SIGKILL)
    time.sleep(0.2)
    assert call("ramp", (3,), "i2")[0].tolist() == [0, 1, 2]


def test_nothing_leaks() -> None:
    call("pid")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        call("ramp", (64, 64, 64), "f4")
        with pytest.raises(PreprocessingError):
            call("fail")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_threads_share_it() -> None:
    results: list[bool] = []

    def work(number: int) -> None:
        results.extend(call("ramp", (number, 7), "i4")[0].shape == (number, 7) for _ in range(10))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


def _asked_after_fork(queue: Any, parents: int) -> None:
    queue.put(call("pid")[1] != parents)


def test_a_fork_starts_its_own_and_leaves_the_parents_alone() -> None:
    parents = call("pid")[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    forked = context.Process(target=_asked_after_fork, args=(queue, parents))
    forked.start()
    assert queue.get(timeout=30)
    forked.join()
    assert call("pid")[1] == parents


@pytest.mark.parametrize("work", ["pid", "busy"])
def test_it_ends_with_its_parent_even_when_that_is_killed(work: str) -> None:
    code = f"""
import os, signal, threading, time
from {HERE} import call
print(call('pid')[1], flush=True)
threading.Thread(target=call, args=({work!r},), daemon=True).start()
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)"""
    import subprocess

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert out.strip().isdigit()
    for _ in range(50):
        if not Path(f"/proc/{out.strip()}").exists():
            return
        time.sleep(0.1)
    os.kill(int(out), signal.SIGKILL)
    raise AssertionError("the child outlived its parent")


def test_a_reply_that_lies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder may have been compromised: sizes are compared with the memory that was received."""
    descriptor = os.memfd_create("small")
    os.ftruncate(descriptor, 10)
    for shape, dtype in (([1 << 40], "u1"), ([-1, -10], "u1"), ([10], "O"), ([3], "f8")):
        with pytest.raises(ValueError):
            child._mapped(descriptor, shape, dtype)
    os.close(descriptor)
