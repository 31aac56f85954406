"""Shared by the tests of faults: one torch thread, and a seed that a failure prints and a rerun can give again."""

import os
import random
import secrets

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def moment():
    """A random.Random for when a fault strikes; DUALSWEEP_FAULT_SEED repeats a run that failed."""
    seed = int(os.environ.get("DUALSWEEP_FAULT_SEED") or secrets.randbelow(2**31))
    print(f"DUALSWEEP_FAULT_SEED={seed}")
    return random.Random(seed)
