"""Memory that steps free and ask for again, in processes of their own: what was allocated before would change it."""

import os
import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, torch
from dualsweep.trainers.allocator import keep_freed_memory

print(keep_freed_memory() if {told} else None)
torch.set_num_threads(1)
for round in range(24):
    blocks = [torch.ones(6 << 20) for _ in range(3)]  # 24 MiB each
    del blocks
    if round == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, told: bool, **environment: str) -> tuple[str, int]:
    """(what the call said, pages that twenty rounds took from the system)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    code = ROUNDS.format(told=told)
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True)
    said, pages = done.stdout.split()
    return said, int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another allocator")
def test_steps_get_their_memory_back_without_asking_the_system():
    told, untold = faults(told=True), faults(told=False)
    assert told[0] == "True"
    assert told[1] < 200 < 600 < untold[1]  # a block has 6144 pages, or 12 of 2 MiB


def test_a_users_own_settings_stay():
    assert faults(told=True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
