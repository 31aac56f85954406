"""A sweep from a checked plan to its report: Ray, DualServer, Tune, tracker, live table, interrupt and resume."""

import contextlib
import fcntl
import importlib
import json
import logging
import os
import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from dualsweep.datasets import build
from dualsweep.orchestration.cluster import (
    Held,
    cluster_address,
    cluster_tended,
    leave_repository_root,
    quiet_environment,
    slots_for,
    start_ray,
    stop_ray,
    wait_until_free,
)
from dualsweep.orchestration.config import ConfigError, SweepConfig, read_fields
from dualsweep.orchestration.dual_ledger import FINAL
from dualsweep.orchestration.dual_server import BASE_TRIAL, NAMESPACE, RayDual, server_name, start_dual_server
from dualsweep.orchestration.interrupts import Halt, as_interrupt, hangup_held_back, interruptible
from dualsweep.orchestration.live import Progress
from dualsweep.orchestration.preflight import Plan, preflight
from dualsweep.orchestration.report import frontier_table, write_report
from dualsweep.orchestration.storage import forget, push_outcome, sign_of_life, sweep_id
from dualsweep.orchestration.tracking import Tracker, Undelivered, check_tracking
from dualsweep.orchestration.tracking_uri import import_mlflow_ahead
from dualsweep.orchestration.watch import Watcher, sweep_metrics, trial_folder, unlisted_point
from dualsweep.trainers.results import publish_base
from dualsweep.trainers.store import StorageError, disk_trouble, in_place_of, local_trouble, writing_to
from dualsweep.trainers.workspace import fingerprint_of, schedule_of, write_json

KEPT = ("completed", "stopped", "diverged")  # a resume runs the others (failed, interrupted, waiting) again
MILESTONES = 20  # results a trial gives to Tune's scheduler, where that compares any
TRACKING_FLUSH_S = 60.0
FREE_S = 20.0  # how long Ray may take to free what the sweep held
PREDECESSOR_S = 60.0  # how long a resume waits for the actors of a driver that died to go
LOCK_S = 1.0  # `status` holds the driver's lock for a moment to see whether it is free


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended. `status`: completed, failed (some trials, named in `failed`), or interrupted."""

    status: str
    folder: Path
    report: Path | None
    tracking_uri: str
    failed: dict[str, str]  # label -> last line of its error
    table: list[dict[str, Any]]
    undelivered: list[Undelivered]
    held: Held

    @property
    def exit_code(self) -> int:
        return {"completed": 0, "failed": 1, "interrupted": 130}[self.status]


def run_sweep(
    config: SweepConfig, *, resume: bool = False, address: str | None = None, console: Console | None = None
) -> Outcome:
    """Check, run and report a sweep.

    Args:
        config: from `load_config`; with `resume`, the one stored in the sweep's folder.
        address: Ray cluster to join, or "local"; default RAY_ADDRESS, a Ray running here, else a local one.
    Raises: ConfigError before anything has started or been written.
    """
    console = console or Console()
    found = cluster_address(address)
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_interrupt())
        plan = preflight(config, resume=resume, on_cluster=found is not None)
        if resume:  # before anything starts; a new sweep has no folder to lock yet
            stack.enter_context(_only_driver(plan))
            _say_if_away(plan.tracking_uri, console)
        quiet_environment()
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.compute.placement_timeout_s))
        leave_repository_root()
        stack.callback(stop_ray)
        importlib.import_module("dualsweep.orchestration.trial")  # Tune and Train; later it would compete with what Ray starts
        import_mlflow_ahead()
        with console.status("starting Ray"), hangup_held_back():
            info = start_ray(address=found or "local")
        stack.enter_context(as_interrupt())  # Ray's own handler of SIGTERM ends with a code that says nothing
        slots = slots_for(config.compute, info)
        plan = replace(plan, config=with_chains(config, slots))
        with contextlib.nullcontext() if resume else _only_driver(plan):
            _write_plan(plan)
            where = f"{info.nodes} node{'s' * (info.nodes != 1)}, {info.cpus:g} CPUs, {info.gpus:g} GPUs"
            console.print(
                f"[bold]{config.name}[/]: {len(plan.points)} trials, {slots} at a time on {where}", highlight=False
            )
            if plan.store.uri is not None:
                console.print(f"  storage  {plan.store.address(plan.folder)}", highlight=False)
            console.print(f"  folder   {plan.folder}\n  tracking {plan.tracking_uri}", highlight=False)
            return _run(plan, slots, console, own_ray=info.local)


def _say_if_away(tracking_uri: str, console: Console) -> None:
    """A resume needs no MLflow: it was there when the sweep was started, and what it misses is delivered later."""
    try:
        check_tracking(tracking_uri, timeout=8.0)
    except ValueError as error:
        console.print(f"going on without MLflow until it is back: {error}", markup=False, highlight=False)


def _run(plan: Plan, slots: int, console: Console, *, own_ray: bool) -> Outcome:
    config = plan.config
    tracker = Tracker(plan.tracking_uri, config.experiment, config.name, sweep_id=sweep_id(config.storage, plan.folder))
    tracker.start_sweep(config.to_dict(), {"dualsweep.method": config.method}, files=[plan.folder / "sweep.yaml"])
    server = _start_dual_server(plan)
    finished = {trial_id: seen for trial_id, seen in server.call("snapshot", {}, []).items() if kept(config, seen)}
    todo = [point for point in plan.points if point["trial_id"] not in finished]
    base = _base_point(plan)
    shown = plan if base is None else replace(plan, points=[base, *plan.points])
    assignments = server.call("assignments")
    again = [point["trial_id"] for point in ([base] if base else []) + todo]
    server.call("reopen", again + placed_again(config, assignments, finished))
    watcher = Watcher(shown, server, tracker, slots=slots)
    watcher.start()
    failed_fit: str | None = None
    halt = Halt()
    results = {trial_id: seen["result"] for trial_id, seen in finished.items()}
    try:
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        ask = partial(_ask_to_halt, halt, watcher, console)
        with Progress(watcher, console, title=config.name), interruptible(ask, insist=partial(_stop_at_once, halt)):
            try:
                if todo or config.thresholds.search is not None:
                    try:
                        points = [base, *todo] if base else todo
                        failed_fit = _fit(plan, points, slots, results, assignments, halt, own_ray=own_ray)
                        if failed_fit is None and not halt.requested:
                            server.call("settle")
                    except Exception as error:
                        with contextlib.suppress(Exception):  # what still trains saves itself; `error` is what is told
                            server.call("interrupt")
                        trouble = disk_trouble(error)  # Tune keeps books of its own in the sweep's folder
                        if trouble is None:
                            raise
                        raise local_trouble(plan.folder, trouble) from error
            finally:
                watcher.stop()  # its last look comes before the table's last picture
    finally:
        held = wait_until_free(0.0 if halt.at_once else FREE_S)
        server.shutdown()
    if watcher.error is not None:
        raise RuntimeError(
            "the sweep's watcher failed; results are in the journal, `dualsweep resume` goes on"
        ) from watcher.error
    return _conclude(plan, watcher, tracker, console, halt.requested, failed_fit, held)


def _fit(
    plan: Plan,
    points: list[dict[str, Any]],
    slots: int,
    results: dict[str, dict[str, Any]],
    assignments: dict[str, dict[str, Any]],
    halt: Halt,
    *,
    own_ray: bool,
) -> str | None:
    """Run the points through Tune.

    Args:
        results, assignments: by trial, what earlier runs of the sweep finished, and handed out.
    Returns: an error that ended trials without their own, else None.
    """
    from ray import tune
    from ray.tune import TuneConfig, Tuner
    from ray.tune.search import Searcher

    from dualsweep.orchestration.points import build_frontier, build_search
    from dualsweep.orchestration.schedulers import trial_scheduler
    from dualsweep.orchestration.trial import SweepTrial

    config = plan.config
    dual_steps = config.dual_steps
    shared = {
        "sweep": config.to_dict(),
        "folder": str(plan.folder),
        "base_dir": str(plan.base_dir),
        "constraint_names": list(plan.constraint_names),
        "own_ray": own_ray,
        "report_every": max(1, dual_steps // MILESTONES) if compared(config) else None,
    }
    search: Searcher
    if config.sweep.order == "listed":
        listed = {point["trial_id"] for point in plan.points}
        searched = [result for trial_id, result in results.items() if trial_id not in listed]
        search, samples = build_search(config, points, shared, searched, halt)
    else:
        search, samples = build_frontier(config, plan.points, points, shared, results, assignments, halt)
    # 0 CPU for the trial's own actor: its worker group holds the CPUs. In-process trials hold them themselves.
    resources = {"memory": 1e6}
    if config.compute.workers == 0:
        resources = {"CPU": config.compute.cpus_per_worker, "GPU": config.compute.gpus_per_worker}
    tuner = Tuner(
        tune.with_resources(SweepTrial, resources),
        tune_config=TuneConfig(
            search_alg=search,
            num_samples=samples,
            max_concurrent_trials=slots,
            reuse_actors=True,
            scheduler=trial_scheduler(config, dual_steps),
            # metric and mode stay None: the searcher and the scheduler have one each, and may differ.
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(plan.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=config.compute.max_failures),
        ),
    )
    with _own_output(plan.folder / "driver.log"), cluster_tended(elastic=config.compute.elastic):
        fitted = tuner.fit()
    errors = [str(error) for error in fitted.errors]
    return errors[-1] if errors else None


def kept(config: SweepConfig, seen: Mapping[str, Any]) -> bool:
    """Whether a resume takes a trial as it is.

    An error inside Tune closes the slots, and what they train is told to stop as if a scheduler wanted the room. Where no
    scheduler stops anybody, such a trial is trained on: only its own stopping rule can have ended it for good.
    """
    if seen["status"] == "stopped" and config.scheduler.kind == "fifo":
        return (seen["result"] or {}).get("stopped_by") not in (None, "scheduler")
    return seen["status"] in KEPT


def compared(config: SweepConfig) -> bool:
    """Whether Tune looks at trials before their end: a scheduler or a search algorithm that compares them."""
    return config.scheduler.kind != "fifo" or config.thresholds.search is not None


def placed_again(
    config: SweepConfig, assignments: Mapping[str, Mapping[str, Any]], finished: Container[str]
) -> list[str]:
    """Trials of points that order adaptive placed in earlier runs of this sweep and a resume trains again.

    They are in no list of points; left closed, their old end would be taken for the new one's.
    """
    if config.sweep.order != "adaptive":
        return []
    placed = [trial_id for trial_id, assignment in assignments.items() if assignment["kind"] == "constrained"]
    return [trial_id for trial_id in placed if trial_id not in finished]


def with_chains(config: SweepConfig, slots: int) -> SweepConfig:
    """`sweep.chains: auto` as a number, fixed when the sweep starts: a resume elsewhere must not plan another path."""
    if config.sweep.chains != "auto" or config.sweep.order != "path":
        return config
    return config.model_copy(update={"sweep": config.sweep.model_copy(update={"chains": slots})})


def _base_point(plan: Plan) -> dict[str, Any] | None:
    """The pretraining, unless its result is there: trained by an earlier sweep, or given by the user."""
    if plan.store.exists(plan.base_dir / "base.json"):
        return None
    return unlisted_point(BASE_TRIAL)


def _conclude(
    plan: Plan,
    watcher: Watcher,
    tracker: Tracker,
    console: Console,
    interrupted: bool,
    failed_fit: str | None,
    held: Held,
) -> Outcome:
    failed = {
        view.point["label"]: (view.error or "").strip().splitlines()[-1] if view.error else view.status
        for view in watcher.views.values()
        if view.status in ("failed", "diverged")
    }
    for view in watcher.views.values():
        if view.status not in FINAL and not interrupted:
            failed[view.point["label"]] = failed_fit or f"ended as {view.status}"
    failed = {**watcher.unkept, **failed}
    status = "interrupted" if interrupted else "failed" if failed else "completed"
    relate_to_unconstrained(plan.folder)
    for view in watcher.views.values():
        folder = trial_folder(plan.folder, view.point)
        if view.result is not None and folder is not None and (folder / "result.json").is_file():
            restated = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            if restated != view.result:
                tracker.finish_trial(view.point["trial_id"], restated, folder)
    report = None
    if any((plan.folder / "trials").glob("*/result.json")):
        with console.status("writing the report"), writing_to(plan.folder / "report"):
            report = write_report(plan.folder).index
    try:
        push_outcome(plan.store, plan.folder)
    except StorageError as error:
        failed["report"] = (
            f"{error}; it lies in {plan.folder}, and `dualsweep report {plan.config.name}` sends it again"
        )
        status = "failed" if status == "completed" else status
    metrics = sweep_metrics([view.point for view in watcher.views.values()], len(failed))
    tracker.finish_sweep(report.parent if report else None, status, metrics)
    with console.status("delivering to MLflow"):
        tracker.close(TRACKING_FLUSH_S)
    return Outcome(
        status,
        plan.folder,
        report,
        plan.tracking_uri,
        failed,
        frontier_table(plan.folder) if report else [],
        tracker.undelivered(),
        held,
    )


def relate_to_unconstrained(folder: Path) -> None:
    """Restate every objective relative to the unconstrained run, which had the same number of steps.

    Continued training improves every run over the pretrained model, so the cost of a requirement is what a run loses
    against the unconstrained one, sample by sample on the same held-out images and noise (paired standard error).
    Without an unconstrained run the objectives stay relative to the pretrained model.
    """
    reference = folder / "trials" / "unconstrained" / "held_out_errors.npy"
    if not reference.is_file():
        return
    base = np.load(reference, allow_pickle=False)
    for path in sorted((folder / "trials").glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        errors = path.parent / "held_out_errors.npy"
        if result.get("objective") is None or not errors.is_file():
            continue
        gap = np.load(errors, allow_pickle=False) - base
        result.setdefault("objective_above_pretrained", result["objective"])
        result["objective"] = {
            "value": float(gap.mean()),
            "stderr": float(gap.std(ddof=1) / np.sqrt(len(gap))),
            "unit": "nats",
            "meaning": "KL(q||p) above the unconstrained run's, on held-out main data",
        }
        write_json(path, result)


def _write_plan(plan: Plan) -> None:
    """The resolved config and the points, for a resume and for the report; an existing folder keeps its own."""
    store = plan.store
    if not store.exists(plan.folder / "sweep.yaml"):
        forget(store, plan.folder)
        text = yaml.safe_dump(plan.config.to_dict(), sort_keys=False)
        with in_place_of(plan.folder / "sweep.yaml") as part:
            part.write_text(text, encoding="utf-8")
            write_json(plan.folder / "points.json", plan.points)  # a sweep is there once sweep.yaml is
        store.push(plan.folder / "points.json")
        store.push(plan.folder / "sweep.yaml")
    if plan.config.model.pretrained and not store.exists(plan.base_dir / "base.json"):
        adopt_pretrained(plan)


def adopt_pretrained(plan: Plan) -> None:
    """Make a base of the user's own model: a copy of it."""
    from dualsweep.trainers.codec import open_codec
    from dualsweep.trainers.methods import METHODS
    from dualsweep.trainers.models import load_model, save_model
    from dualsweep.trainers.prompts import open_prompts

    config = plan.config.to_dict()
    codec, data = open_codec(config["model"]), build(plan.config.data)
    sets = METHODS[plan.config.method].pretraining_sets(data.constraint_names, plan.config.thresholds.unit)
    prompts = open_prompts(config["model"], sets)
    denoiser = load_model(plan.config.model.pretrained, prompts and prompts.embeddings(plan.store))
    save = partial(save_model, denoiser, schedule_of(config), codec=codec)
    publish_base(plan.base_dir, save, fingerprint_of(data, codec, prompts), plan.store)


def stored_config(name: str, storage: Path) -> SweepConfig:
    """The config a sweep was started with. Raises: ConfigError when there is none or it is damaged."""
    path = storage / name / "sweep.yaml"
    if not path.is_file():
        raise ConfigError(f"name: no sweep {name!r} in {storage}; `dualsweep status` lists what is there")
    return SweepConfig.from_dict(read_fields(path), source=str(path))


def _start_dual_server(plan: Plan) -> RayDual:
    """Start the DualServer once that of a driver that died is gone: on a cluster Ray takes some seconds to notice.

    We hold the driver's lock, so nobody needs the old one; ended by force it might leave a request half answered.
    """
    import ray

    folder, deadline = plan.folder, time.monotonic() + PREDECESSOR_S
    while True:
        try:
            ray.get_actor(server_name(folder), namespace=NAMESPACE)
        except ValueError:
            return start_dual_server(folder, plan.config.storage)
        if time.monotonic() > deadline:
            raise ConfigError(
                f"name: sweep {folder.name!r} still has its DualServer on this cluster after {PREDECESSOR_S:g} s, so its "
                "driver runs on another machine, or Ray has not noticed its end; interrupt it there, or try again"
            )
        time.sleep(0.2)


def _ask_to_halt(halt: Halt, watcher: Watcher, console: Console) -> bool:
    """The first Ctrl-C asks every trial for a checkpoint and ends the sweep when they have it. Returns: whether this was it."""
    if halt.requested:
        return False
    halt.requested = True
    watcher.interrupt()
    console.print(
        f"interrupted: saving checkpoints, then `dualsweep resume {watcher.plan.config.name}` goes on (Ctrl-C again to stop at once)",
        highlight=False,
    )
    return True


def _stop_at_once(halt: Halt) -> None:
    """What still trains ends with this driver."""
    halt.at_once = True
    raise KeyboardInterrupt


@contextlib.contextmanager
def _only_driver(plan: Plan) -> Iterator[None]:
    """Raises: ConfigError when the sweep has a driver, on this machine or, with remote storage, on any."""
    with driver_lock(plan.folder, "wait for it or interrupt it"), sign_of_life(plan.store, plan.folder):
        yield


@contextlib.contextmanager
def driver_lock(folder: Path, remedy: str) -> Iterator[None]:
    """One driver a sweep; the lock goes with the process. Raises: ConfigError when another one holds the folder,
    or nobody can."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_S
    with open(folder / "driver.lock", "a", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"name: sweep {folder.name!r} is being run by another process; {remedy}"
                    ) from None
            except OSError as error:
                raise ConfigError(
                    f"storage: {folder / 'driver.lock'} cannot be locked ({os.strerror(error.errno or 0)}); mount the file system "
                    "with locks, or give another folder with storage=PATH"
                ) from None
            time.sleep(0.05)
        yield


@contextlib.contextmanager
def _own_output(path: Path) -> Iterator[None]:
    """Tune prints tables whatever its verbosity; they go to a file, and so do Ray's log lines."""
    handler = logging.FileHandler(path, encoding="utf-8")
    loggers = [logging.getLogger(name) for name in ("ray", "ray.tune", "ray.train")]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    with open(path, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            yield
        finally:
            for logger, handlers, propagate in before:
                logger.handlers, logger.propagate = handlers, propagate
            handler.close()
