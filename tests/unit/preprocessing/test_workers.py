"""Work is done with and without the shared memory that processes need."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

CODE = """
import os
from ctclip.preprocessing.workers import worker_pool
with worker_pool(2) as pool:
    print(sorted(pool.map(abs, [1, -2, 3])), pool.submit(os.getpid).result() == os.getpid())
"""


@pytest.mark.parametrize(
    ("mount", "threads"),
    [
        ("true", False),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", True),
        ("mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9", True),
    ],
    ids=["usual", "read-only", "absent"],
)
def test_processes_or_threads(mount: str, threads: bool) -> None:
    if os.getuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("only root can mount another /dev/shm")
    command = f'{mount} && exec "{sys.executable}" -c "$CODE"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        capture_output=True, text=True, check=False, env=os.environ | {"CODE": CODE},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[1,", "2,", "3]", str(threads)]
    assert len(done.stderr.splitlines()) == int(threads)
    assert ("/dev/shm is missing or not writable" in done.stderr) == threads


def test_ctrl_c_ends_busy_and_idle_workers_without_a_word() -> None:
    script = """
import sys, time
from ctclip.preprocessing.workers import worker_pool
try:
    with worker_pool(2) as pool:
        list(pool.map(time.sleep, [0.3, 0.3]))
        busy = pool.submit(time.sleep, 60)
        print("busy", flush=True)
        busy.result()
except KeyboardInterrupt:
    sys.exit(130)
"""
    # Signals that the tests' own process ignores would be ignored there too.
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{script}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 130
