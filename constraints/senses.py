"""Which way a threshold points in each formulation: unlearning wants a divergence large where fairness wants it small."""

FORGETTING = ("unlearn_reverse_kl", "unlearn_forward_kl", "siss")


def threshold_sense(method: str, unit: str) -> str | None:
    """``"<="`` or ``">="`` for the thresholds of a formulation, None for the unit's own sense.

    Divergences from what is forgotten, and losses on it, are kept above their thresholds; its share below.
    """
    if method not in FORGETTING or unit not in ("share", "loss", "nats"):
        return None
    return "<=" if unit == "share" else ">="
