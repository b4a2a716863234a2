"""Memory kept between steps, by what the kernel counts."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, torch
from ctclip.training.allocator import keep_freed_memory
if {keeps}:
    keep_freed_memory()
for _ in range(2):
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_used_before_is_not_asked_for_again() -> None:
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS.format(keeps=k)], capture_output=True, text=True, check=True
            ).stdout
        )
        for k in (True, False)
    )
    assert kept < 100
    assert given_back > kept
