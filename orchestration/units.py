"""How requests and measurements are worded in each constraint unit and formulation, and which end of the scale is stricter.

A threshold is read as ``value >= threshold`` or ``value <= threshold``; the report, the terminal and MLflow all show
values as the user asked for them. In a min-max problem (composition) nothing is requested: the largest value counts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dualsweep.constraints.problem import resolved_sense
from dualsweep.constraints.senses import threshold_sense

NORMAL_95 = 1.96  # two-sided 95 % quantile of the standard normal: every error bar is value +- 1.96 s.e.
MOST_DECIMALS = 6
MIN_MAX = ("composition",)
REVERSE = (
    "composition",
    "unlearn_reverse_kl",
    "esd",
)  # divergences of the model from the sets, not of the sets from it


def finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_float(value: object) -> float:
    return float(value) if finite(value) else math.nan


def number(value: object, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if finite(value) else "–"


def measured(value: float, stderr: float) -> str:
    """``value ± 1.96 s.e.``, both to the second digit of the bound; three digits where no standard error is known."""
    half = NORMAL_95 * stderr
    if not (finite(value) and finite(half) and half > 0):
        return number(value)
    decimals = max(1 - math.floor(math.log10(half)), 0)
    if decimals > MOST_DECIMALS:
        return f"{value:.1e} ± {half:.1e}"
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The words and scale of values in one unit, read in one sense."""

    name: str
    sense: str  # "<=" or ">="
    noun: str
    ask: str  # the request, with {names} for what it is about
    symbol: str  # one constraint's value, with {name}
    canonical: str  # unit of violations
    suffix: str = ""
    scale: float = 1.0  # of a value as it is shown
    min_max: bool = False

    @property
    def stricter(self) -> int:
        """+1 where larger thresholds ask for more."""
        return 1 if self.sense == ">=" else -1

    @property
    def sign(self) -> str:
        return "≥" if self.stricter > 0 else "≤"

    @property
    def worst(self) -> str:
        return "smallest" if self.stricter > 0 else "largest"

    @property
    def axis(self) -> str:
        return f"({self.suffix.strip()})" if self.suffix else ""

    def text(self, value: float, stderr: float = math.nan) -> str:
        """The value as a reader writes it, with its 95 % bound where a standard error is known."""
        return f"{measured(value * self.scale, stderr * self.scale)}{self.suffix}" if finite(value) else "–"

    def of(self, name: str) -> str:
        """What a value of this constraint is, in a few characters."""
        return self.symbol.format(name=name)

    def from_metric(self, metric: float, stderr: float) -> tuple[float, float]:
        """User value and standard error of a metric in its natural direction: a share's is -log share, others are values."""
        if self.name != "share":
            return metric, stderr
        return math.exp(-metric), math.exp(-metric) * stderr


_NOUNS = {
    "share": "share",
    "loss": "loss",
    "nats": "divergence",
    "likelihood_ratio": "likelihood ratio",
    "reward": "reward",
}
_ASKS = {
    ("share", ">="): "give {names} at least a requested share of the samples",
    ("share", "<="): "give {names} at most a requested share of the samples",
    ("loss", "<="): "keep the denoising loss on {names} at or below a requested value",
    ("loss", ">="): "keep the denoising loss on {names} at or above a requested value",
    ("nats", "<="): "keep the divergence from {names} at or below a requested number of nats",
    ("nats", ">="): "keep the divergence from {names} at or above a requested number of nats",
    ("likelihood_ratio", "<="): "keep the likelihood ratio of {names} at or below a requested value",
    ("likelihood_ratio", ">="): "keep the likelihood ratio of {names} at or above a requested value",
    ("reward", ">="): "raise the reward of {names} by at least a requested number of standard deviations",
    ("reward", "<="): "keep the reward of {names} at or below a requested number of standard deviations",
}
_SYMBOLS = {
    "share": "share of {name}",
    "loss": "loss on {name}",
    "nats": "KL({name}||p)",
    "likelihood_ratio": "ratio of {name}",
    "reward": "reward {name}",
}
_SCALES = {"share": {"suffix": " %", "scale": 100.0}, "nats": {"suffix": " nats"}, "reward": {"suffix": " s.d."}}
_CANONICAL = {
    "share": "nats",
    "loss": "mean squared error",
    "nats": "nats",
    "likelihood_ratio": "likelihood ratio",
    "reward": "standard deviations",
}


def unit_of(name: str, *, method: str = "", law: str | None = None, sense: str | None = None) -> Unit:
    """The unit called ``name`` as a formulation uses it.

    Args:
        law: of a composition: "or" measures the divergence of the sets from the model, else the model's from them.
        sense: "<=" or ">=" where a result says it; None: the formulation's.
    Raises: ValueError for an unknown unit.
    """
    sense = resolved_sense(name, sense or threshold_sense(method, name))
    if name not in _NOUNS:
        raise ValueError(f"unknown unit {name!r}; the known units are {sorted(_NOUNS)}")
    noun, ask, symbol = _NOUNS[name], _ASKS[name, sense], _SYMBOLS[name]
    if name == "nats" and method in REVERSE and law != "or":
        symbol = "KL(p||{name})"
    if name == "loss" and method in ("adaptation", "duo"):  # not of denoising, but of two models' predictions
        noun, symbol = "distance", "distance on {name}"
        ask = "keep the mean squared distance to the pretrained model on {names} at or below a requested value"
    if method in MIN_MAX:
        ask = f"make the largest {noun} from {{names}} as small as possible"
    return Unit(
        name=name,
        sense=sense,
        noun=noun,
        ask=ask,
        symbol=symbol,
        canonical=_CANONICAL[name],
        min_max=method in MIN_MAX,
        **_SCALES.get(name, {}),
    )


def unit_of_config(config: Mapping) -> Unit:
    """The unit of a sweep's thresholds, from its complete configuration as a dictionary."""
    law = config["formulation"]["law"]
    return unit_of(config["thresholds"]["unit"], method=config["method"], law=law)


def calibration_values(calibration: Mapping, unit: Unit) -> list[tuple[str, float, float, int]]:
    """(constraint, user value, standard error, draws) of the pretrained model; empty where it was not measured so."""
    metrics, stderrs, counts = (calibration.get(key) or {} for key in ("metrics", "stderrs", "counts"))
    if calibration.get("unit") != unit.name:
        return []
    return [
        (name, *unit.from_metric(metric, as_float(stderrs.get(name))), int(counts.get(name) or 0))
        for name, metric in metrics.items()
        if finite(metric)
    ]


def calibration_text(calibration: Mapping, unit: Unit, most: int = 6) -> str:
    """One line of what the pretrained model measures, such as ``KL(p||near) 1.93 ± 0.02 nats``; empty if unknown."""
    parts = [
        f"{unit.of(name)} {unit.text(value, stderr)}"
        for name, value, stderr, _ in calibration_values(calibration, unit)
    ]
    return ", ".join(parts if len(parts) <= most else [*parts[: most - 1], f"{len(parts) - most + 1} more"])
