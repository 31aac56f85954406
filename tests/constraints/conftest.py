"""Hypothesis here: fixed seeds, and no time limit an example (the two cores are shared)."""

from hypothesis import settings

settings.register_profile("dualsweep", derandomize=True, deadline=None)
settings.load_profile("dualsweep")
