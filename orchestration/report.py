"""The report of a sweep: one self-contained HTML page with its figures and tables, read from the sweep directory alone.

Whatever state the sweep is in, the report says so: trials that failed, are unfinished or never started are named, and a
file that cannot be read becomes a note on the page, not an error. Nothing of Ray, MLflow or torch is needed for it.
"""

import base64
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
import yaml

from dualsweep.orchestration.sweep_record import load_sweep
from dualsweep.orchestration.tables import frontier_table, write_tables
from dualsweep.orchestration.units import finite, measured, number

__all__ = ["ReportPaths", "frontier_table", "write_report"]


@dataclass(frozen=True, kw_only=True)
class ReportPaths:
    """What ``write_report`` wrote; figures by name (without those that had nothing to show), tables by file name."""

    index: Path
    figures: dict[str, Path]
    tables: dict[str, Path]

    @property
    def directory(self) -> Path:
        return self.index.parent


def write_report(sweep_dir: Path, out: Path | None = None) -> ReportPaths:
    """Write ``index.html``, the PNGs and ``tables/`` (CSV and Parquet) to ``out``, by default ``<sweep_dir>/report``.

    Raises: ValueError if there is no sweep at ``sweep_dir``.
    """
    # Here and not above: matplotlib is slow to import, and the command line's closing table needs none of it.
    from dualsweep.orchestration.figures import draw_figures

    sweep = load_sweep(sweep_dir)
    out = Path(out) if out is not None else sweep.directory / "report"
    (out / "tables").mkdir(parents=True, exist_ok=True)
    tables = write_tables(sweep, out / "tables")
    figures = draw_figures(sweep, out)
    template = resources.files("dualsweep.orchestration").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"num": number, "listed": listed}
    environment.tests["finite"] = finite
    page = environment.from_string(template).render(
        sweep=sweep,
        unit=sweep.unit,
        front=sweep.front(),
        measured=measured,
        images={name: base64.b64encode(path.read_bytes()).decode() for name, path in figures.items()},
        tables=sorted(path.name for path in tables.values()),
        config=yaml.safe_dump(sweep.config, sort_keys=False, allow_unicode=True),
    )
    index = out / "index.html"
    index.write_text(page, encoding="utf-8")
    return ReportPaths(index=index, figures=figures, tables=tables)


def listed(words: list[str], most: int = 8) -> str:
    """The words with commas and a last "and"; beyond ``most`` the rest are counted."""
    words = words if len(words) <= most else [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
