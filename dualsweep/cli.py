"""The command line. Exit codes: 0 done, 1 some trials failed (named), 2 bad input (nothing started), 130 interrupted."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dualsweep import __version__
from dualsweep.orchestration.interrupts import LastingStream

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Threshold sweeps of constrained diffusion training.",
)
# Bound to the streams of now: while Tune runs, sys.stdout is redirected to the sweep's log.
console = Console(file=LastingStream(sys.stdout))
errors = Console(file=LastingStream(sys.stderr))

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="A sweep's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Fields to override.", show_default=False)
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join, or local; default RAY_ADDRESS, a Ray running here, else one is started.",
        show_default=False,
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(help="Folder or address of the sweeps; default DUALSWEEP_STORAGE, else ./runs.", show_default=False),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A sweep's name.", show_default=False)]


@app.command()
def sweep(
    file: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    fresh_name: Annotated[
        bool, typer.Option("--fresh-name", help="Append a number to the name when it is taken.")
    ] = False,
) -> None:
    """Run a sweep: every threshold of FILE, the baselines, and the report."""
    from dualsweep.orchestration.config import load_config
    from dualsweep.orchestration.preflight import fresh_name as free_name
    from dualsweep.orchestration.sweep import run_sweep

    config = load_config(file, overrides or [])
    _finish(run_sweep(free_name(config) if fresh_name else config, address=address, console=console))


@app.command()
def train(
    file: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=VALUE", help="Threshold of an axis, such as minority=0.1; default the first point of FILE."
        ),
    ] = None,
) -> None:
    """Train one point of FILE, without baselines."""
    from dualsweep.orchestration.config import load_config
    from dualsweep.orchestration.preflight import first_point
    from dualsweep.orchestration.sweep import run_sweep

    _finish(run_sweep(first_point(load_config(file, overrides or []), at or []), address=address, console=console))


@app.command()
def resume(name: Name, storage: Storage = None, address: Address = None) -> None:
    """Go on with an interrupted sweep: finished trials are kept, the others continue from their checkpoints."""
    from dualsweep.orchestration.sweep import run_sweep, stored_config

    root, store = _brought(storage, name), _store(storage)
    # A folder that was moved is where it is now, not where its file says.
    config = stored_config(name, root).model_copy(update={"storage": store.uri or str(root), "name": name})
    _finish(run_sweep(config, resume=True, address=address, console=console))


@app.command()
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A sweep's name; without it, all sweeps.", show_default=False)
    ] = None,
    storage: Storage = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep showing it until Ctrl-C.")] = False,
) -> None:
    """Show where a sweep stands, whether it is running or not."""
    from dualsweep.orchestration.status import follow_status, list_sweeps, status_table

    root = _brought(storage, name)
    if name is None:
        console.print(list_sweeps(root))
    elif follow:
        follow_status(root, name, console, renew=lambda: _brought(storage, name))
    else:
        console.print(status_table(root, name))


@app.command()
def report(
    name: Name,
    storage: Storage = None,
    track: Annotated[bool, typer.Option(help="Also log it to the sweep's MLflow run.")] = True,
) -> None:
    """Write the report of a sweep again."""
    from dualsweep.orchestration.status import rewrite_report
    from dualsweep.orchestration.storage import push_outcome

    page = rewrite_report(_brought(storage, name, trials=True), name, track=track)
    push_outcome(_store(storage), page.parent.parent)
    console.print(f"report   {page}", highlight=False, soft_wrap=True)


@app.command()
def sync(name: Name, storage: Storage = None) -> None:
    """Deliver to MLflow what it has not got yet, from the sweep's folder; each row once. Exit code 1: not everything."""
    from dualsweep.orchestration.delivery import deliver_again

    done = deliver_again(_brought(storage, name, models=True), name)
    if done.delivered:
        parts = [f"{count} {kind if count > 1 else kind.removesuffix('s')}" for kind, count in done.delivered.items()]
        console.print("delivered " + ", ".join(parts), highlight=False, soft_wrap=True)
    elif not done.undelivered:
        console.print("nothing to deliver: MLflow has everything")
    _say_undelivered(name, done.undelivered)
    raise typer.Exit(1 if done.undelivered else 0)


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model folder or its address, such as runs/NAME/trials/ID/model.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Picture to write; vectors are also written as .npy beside it.")] = Path(
        "samples.png"
    ),
    count: Annotated[int, typer.Option(min=1, max=10_000)] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw samples from a trained model, or from a composed law by its own sampler."""
    from dualsweep.orchestration.sampling import draw_samples
    from dualsweep.orchestration.storage import bring_model

    for path in draw_samples(bring_model(model), out, count=count, steps=steps, seed=seed):
        console.print(f"samples  {path}", highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a sweep's file, for editors."""
    from dualsweep.orchestration.config import SweepConfig

    typer.echo(json.dumps(SweepConfig.model_json_schema(), indent=2))


@app.command()
def doctor(storage: Storage = None, address: Address = None) -> None:
    """Check what this machine (and, with an address, a cluster) can run, and what is missing."""
    from dualsweep.orchestration.doctor import check_everything

    rows = check_everything(_store(storage), address)
    table = Table("", "what", "found", "remedy")
    for row in rows:
        table.add_row("[green]ok[/]" if row.ok else "[red]missing[/]", row.what, row.found, row.remedy)
    console.print(table)
    raise typer.Exit(0 if all(row.ok for row in rows) else 1)


def _store(storage: str | None):
    from dualsweep.orchestration.storage import impatient, open_store

    return impatient(open_store(storage or os.environ.get("DUALSWEEP_STORAGE") or "runs"))


def _brought(storage: str | None, name: str | None, **what: bool) -> Path:
    """The local folder of all sweeps, after fetching what a remote storage has of this one (of each, without a name)."""
    from dualsweep.orchestration.storage import bring_all

    return bring_all(_store(storage), name, **what)


def _finish(outcome) -> None:
    if outcome.table:
        console.print(_closing_table(outcome.table))
    if outcome.report:
        console.print(f"report   {outcome.report}", highlight=False, soft_wrap=True)
    console.print(f"mlflow   mlflow ui --backend-store-uri {outcome.tracking_uri}", highlight=False, soft_wrap=True)
    for label, error in outcome.failed.items():
        errors.print(f"[red]failed[/]   {escape(f'{label}: {error}')}", highlight=False, soft_wrap=True)
    _say_undelivered(outcome.folder.name, outcome.undelivered)
    if outcome.held.cpus or outcome.held.placement_groups:
        errors.print(
            f"Ray still holds {outcome.held.cpus:g} CPUs and {outcome.held.placement_groups} placement groups of this sweep",
            highlight=False,
        )
    if outcome.status == "interrupted":
        console.print(f"interrupted; `dualsweep resume {outcome.folder.name}` goes on", highlight=False)
    raise typer.Exit(outcome.exit_code)


def _say_undelivered(name: str, undelivered: list) -> None:
    """What MLflow has not got, a line a trial with the last error, and the command that delivers it."""
    owners: dict[str | None, list] = {}
    for item in undelivered:
        owners.setdefault(item.trial_id, []).append(item)
    for trial_id, items in owners.items():
        owner = "the sweep" if trial_id is None else f"trial {trial_id}"
        what = ", ".join(f"{item.count} rows" if item.what == "rows" else item.what for item in items)
        error = next((item.error for item in items if item.error), "not tried yet")
        errors.print(f"MLflow has not got {what} of {owner} ({error})", highlight=False, markup=False, soft_wrap=True)
    if undelivered:
        errors.print(f"`dualsweep sync {name}` delivers it when MLflow is back", highlight=False, soft_wrap=True)


def _closing_table(rows: list[dict]) -> Table:
    """Baselines and points: what was asked, what came out, what it costs, and whether the certificate holds."""
    from dualsweep.orchestration.units import number, unit_of

    unit = unit_of(rows[0]["unit"], sense=rows[0]["sense"])
    warned = any(row["warnings"] for row in rows)
    # The units stand in the heads: the table has to fit 80 columns.
    table = Table(
        "trial",
        "status",
        f"asked {unit.sign} {unit.axis}".strip(),
        f"{unit.worst} {unit.noun} {unit.axis}".strip(),
        f"cost ({rows[0]['objective_unit']})",
        "certificate",
        *(["signs of trouble"] if warned else []),
        "front",
        title="result",
        title_justify="left",
        caption="± is 95 %",
        caption_justify="left",
    )
    for row in rows:
        table.add_row(
            escape(row["label"]),
            row["status"],
            number(row["requested"] * unit.scale) if math.isfinite(row["requested"]) else "",
            _measured(row["achieved"] * unit.scale, row["achieved_stderr"] * unit.scale),
            _measured(row["objective"], row["objective_stderr"]),
            row["verdict"],
            *([escape(row["warnings"])] if warned else []),
            "*" if row["on_front"] else "",
        )
    return table


def _measured(value: float, stderr: float) -> str:
    from dualsweep.orchestration.units import measured

    return measured(value, stderr) if math.isfinite(value) else ""


@app.callback(invoke_without_command=True)
def version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, storage that fails in the middle one and code 1."""
    from dualsweep.orchestration.config import ConfigError
    from dualsweep.trainers.store import StorageError

    try:
        app(standalone_mode=True)
    except ConfigError as error:
        errors.print(f"[red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True, markup=True)
        sys.exit(2)
    except StorageError as error:
        errors.print(f"[red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True, markup=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
