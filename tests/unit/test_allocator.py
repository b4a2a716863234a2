"""The location of large arrays, according to the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

PLACE = """
import torch
from ctclip.training.allocator import keep_freed_memory
if {keeps}:
    keep_freed_memory()
place = torch.ones(16 << 20).data_ptr()
ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in open("/proc/self/maps") if "[heap]" in line]
print(any(low <= place < high for low, high in ends))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_arrays_come_from_the_heap_that_is_kept() -> None:
    kept, mapped = (
        subprocess.run(
            [sys.executable, "-c", PLACE.format(keeps=keeps)], capture_output=True, text=True, check=True
        ).stdout.strip()
        for keeps in (True, False)
    )
    assert (kept, mapped) == ("True", "False")
