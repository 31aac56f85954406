"""MLflow behind the sweep: a parent run a sweep, a child run a trial, written by a background thread.

The sweep never waits for MLflow and never fails because of it. What cannot be delivered stays in memory and is tried
again; what is left when the tracker closes is delivered later from the sweep's folder (`delivery.py`). Every delivery
may be repeated, because the server is asked what it has: runs are found by their tags, a curve goes on behind its
newest step, and what consists of files leaves its fingerprint as a tag, written last. A record of our own beside the
sweep could disagree with the server; this one cannot. MLflow is imported only where it is used: it takes 2 s.
"""

import copy
import getpass
import hashlib
import importlib.metadata
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dualsweep.orchestration.outbox import GiveUp, Item, Outbox, Undelivered
from dualsweep.orchestration.trace import clean_name, metric_key, row_metrics
from dualsweep.orchestration.tracking_uri import SQLITE, check_tracking, mlflow_client, resolve_tracking_uri
from dualsweep.orchestration.units import calibration_values, unit_of

__all__ = ["Tracker", "Undelivered", "check_tracking", "resolve_tracking_uri"]

METRICS_PER_BATCH = 1000  # MLflow's own limit of one `log_batch`
HAS = "dualsweep.has."  # tags under this prefix hold the fingerprint of something that has arrived whole
PIPELINES = ("DDPMPipeline", "DDIMPipeline")  # need no prompt, so that `predict` can sample from them

_TRIAL_STATUS = {"completed": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "diverged": "FAILED"}
_SWEEP_STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_FEASIBLE = {"feasible": "true", "infeasible": "false", "undecided": "undecided"}


class Tracker:
    """Writes one sweep to MLflow. Every method returns at once and raises nothing because of MLflow.

    `sweep_id` keeps apart sweeps that share a name and an experiment on one server; a resumed sweep must give the
    same one. `artifact_location` is used when the experiment is new; by default a folder beside the SQLite file, or
    whatever the server decides. Files handed over must stay as they are until delivered.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        sweep_name: str,
        artifact_location: str | None = None,
        *,
        sweep_id: str | None = None,
    ) -> None:
        self.tracking_uri, self.experiment, self.sweep_name = tracking_uri, experiment, sweep_name
        self._artifact_location = artifact_location
        self._sweep_tags = {"dualsweep.sweep": clean_name(sweep_name)}
        if sweep_id is not None:
            self._sweep_tags["dualsweep.sweep_id"] = clean_name(sweep_id)
        self._outbox = Outbox(self._answers)
        self._trials: dict[str, tuple[str, tuple[str, ...]]] = {}  # id -> label, constraint names
        self._unfinished: set[str] = set()
        self._client_: Any = None  # from here on: the writer thread only
        self._experiment_id: str | None = None
        self._run_ids: dict[str | None, str] = {}  # trial id (None: the sweep) -> MLflow run id
        self._in_doubt: set[str | None] = set()  # owners of runs whose creation was not answered
        self._newest_steps: dict[str, dict[str, int]] = {}  # trial id -> curve -> newest step that MLflow has
        self._model_ids: dict[str, str] = {}
        self._delivered: Counter[str] = Counter()

    def start_sweep(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        *,
        files: Sequence[Path] = (),
        reopen: bool = True,
    ) -> None:
        """Find or create the parent run; `params` may be nested, `files` (sweep.yaml) become artifacts.

        With `reopen` a run that had ended shows as running again: a resumed sweep.
        """

        flat = dict(_flatten(params))  # now, for the caller may go on with its dict

        def deliver() -> None:
            self._describe(None, flat, tags or {}, reopen)
            for path in files:
                self._once(None, path.name, "files", _fingerprint(path), partial(self._upload_file, None, path))

        self._put("start", None, deliver)

    def log_calibration(self, calibration: Mapping[str, Any]) -> None:
        """What the pretrained model measures, in the user's unit: metrics ``pretrained/<constraint>`` of the parent run."""
        unit = unit_of(calibration["unit"])
        metrics = {}
        for name, value, stderr, _ in calibration_values(calibration, unit):
            metrics[metric_key("pretrained", name)] = value
            metrics[metric_key("pretrained_stderr", name)] = stderr

        now = _now()

        def deliver() -> None:
            self._describe(None, {"pretrained.unit": unit.name}, {}, reopen=False)
            self._delivered["calibrations"] += self._log_final(None, metrics, {}, step=0, at=now)

        self._put("calibration", None, deliver)

    def start_trial(
        self,
        trial_id: str,
        label: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        *,
        constraints: Sequence[str],
        reopen: bool = True,
    ) -> None:
        """Find or create the child run of a trial; `constraints` name the entries of the vectors in its rows."""
        self._trials[trial_id] = (label, tuple(constraints))
        self._unfinished.add(trial_id)
        flat = dict(_flatten(params))
        self._put("start", trial_id, lambda: self._describe(trial_id, flat, tags or {}, reopen))

    def log_rows(self, trial_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand over trace rows in the order of their steps; they become metrics at step `dual_step` and time `wall_time`.

        The rows are kept, not copied, and must stay as they are.
        """
        item = Item(what="rows", trial_id=trial_id, rows=list(rows))
        item.deliver = lambda: self._log_rows(trial_id, item.rows)
        self._outbox.put(item)

    def finish_trial(self, trial_id: str, result: Mapping[str, Any], trial_dir: Path | None) -> None:
        """The model, final metrics and tags, artifacts and the status of a trial, from its result.json and folder.

        Four items, so that a model that cannot be stored does not hide the result.
        """
        result = copy.deepcopy(dict(result))
        status = _TRIAL_STATUS.get(result.get("status", ""), "FAILED")
        self._unfinished.discard(trial_id)
        if trial_dir is not None and (trial_dir / "model").is_dir():
            self._put("model", trial_id, lambda: self._log_model(trial_id, result, trial_dir / "model"))
        now = _now()
        self._put("result", trial_id, lambda: self._log_result(trial_id, result, now))
        self._put("artifacts", trial_id, lambda: self._log_artifacts(trial_id, result, trial_dir))
        self._put("status", trial_id, lambda: self._end_run(trial_id, status))

    def finish_sweep(
        self,
        report_dir: Path | None,
        status: str,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Report, summary and status (`completed`, `failed`, `interrupted`) of the sweep; open trials are closed.

        Raises: ValueError for another status.
        """
        if status not in _SWEEP_STATUS:
            raise ValueError(f"status of a sweep is {status!r}; known: {sorted(_SWEEP_STATUS)}")

        now = _now()

        def deliver() -> None:
            every_tag = {"dualsweep.status": status, **(tags or {})}
            self._delivered["sweep totals"] += self._log_final(None, metrics or {}, every_tag, step=0, at=now)
            if report_dir is not None:
                upload = partial(self._upload_folder, None, report_dir, "report")
                self._once(None, "report", "reports", _fingerprint(report_dir), upload)

        for trial_id in sorted(self._unfinished):
            self._put("status", trial_id, lambda trial_id=trial_id: self._end_run(trial_id, "KILLED"))
        self._unfinished.clear()
        self._put("report", None, deliver)
        self._put("status", None, lambda: self._end_run(None, _SWEEP_STATUS[status]))

    def undelivered(self) -> list[Undelivered]:
        """What MLflow has not got by now: still queued, or given up with its error."""
        return self._outbox.undelivered()

    def delivered(self) -> dict[str, int]:
        """What MLflow got from this tracker and had not before, by kind: rows, runs, results, models and so on."""
        return {kind: count for kind, count in self._delivered.items() if count}

    def flush(self, timeout: float) -> int:
        """Wait until everything is delivered or given up, at most `timeout` seconds; less when nothing gets through.

        Returns: the number of items that MLflow has not got, each row counting one.
        """
        return self._outbox.flush(timeout)

    def close(self, timeout: float) -> int:
        """Flush, then end the writer thread; returns as `flush`. `undelivered()` still tells what is missing.

        A request in progress is not waited for beyond `timeout`; its thread is a daemon and ends after it.
        """
        return self._outbox.close(timeout)

    def _put(self, what: str, trial_id: str | None, deliver: Callable[[], None]) -> None:
        self._outbox.put(Item(what=what, trial_id=trial_id, deliver=deliver))

    # From here on in the writer thread.

    def _answers(self) -> bool:
        try:
            self._client().search_experiments(max_results=1)
        except Exception:  # noqa: BLE001 - the question is only whether it works
            return False
        return True

    def _client(self) -> Any:
        if self._client_ is None:
            self._client_ = mlflow_client(self.tracking_uri)  # makes the folder of an SQLite file
        return self._client_

    def _experiment(self) -> str:
        if self._experiment_id is None:
            found = self._client().get_experiment_by_name(self.experiment)
            if found is None:
                location = self._artifact_location
                if location is None and (match := SQLITE.match(self.tracking_uri)):
                    # MLflow's own default is a folder relative to the working directory.
                    location = (Path(self.tracking_uri[match.end() :]).parent / "mlflow-artifacts").as_uri()
                self._experiment_id = self._client().create_experiment(self.experiment, artifact_location=location)
            elif found.lifecycle_stage != "active":
                raise GiveUp(
                    f"tracking.experiment = {self.experiment!r}: deleted in MLflow; restore it "
                    f"(mlflow experiments restore --experiment-id {found.experiment_id}) or choose another name"
                )
            else:
                self._experiment_id = found.experiment_id
        return self._experiment_id

    def _run_id(self, trial_id: str | None) -> str:
        """The run found by its tags, or a new one; the tags are part of its creation, so a lost answer does no harm."""
        if trial_id in self._run_ids:
            return self._run_ids[trial_id]
        tags, name = {**self._sweep_tags, "dualsweep.kind": "sweep"}, self.sweep_name
        if trial_id is not None:
            if trial_id not in self._trials:
                raise GiveUp(f"start_trial was not called for trial {trial_id!r}")
            name = self._trials[trial_id][0]
            tags |= {"dualsweep.kind": "trial", "dualsweep.trial": clean_name(trial_id)}
            tags["mlflow.parentRunId"] = self._run_id(None)
        experiment_id = self._experiment()
        found = self._find_run(tags)
        if found is None:
            source = {"mlflow.source.name": "dualsweep", "mlflow.user": _user_name()}
            try:
                found = self._client().create_run(experiment_id, run_name=name, tags=tags | source)
            except Exception:
                self._in_doubt.add(trial_id)
                raise
            self._delivered["runs"] += 1
        self._run_ids[trial_id] = found.info.run_id
        return self._run_ids[trial_id]

    def _find_run(self, tags: Mapping[str, str]) -> Any:
        """The run with these tags, or None. More than one means that a creation arrived whose answer was lost: a
        server that hangs may perform it long after we asked again. Then the one that was written to stays."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._client().search_runs([self._experiment()], query, order_by=["attributes.start_time ASC"])
        found = sorted(found, key=_is_empty)
        for other in found[1:]:
            if _is_empty(other):
                self._client().delete_run(other.info.run_id)
        return found[0] if found else None

    def _settle(self, trial_id: str | None) -> None:
        """Remove what a creation left that arrived after all; when nothing is left to deliver of its owner."""
        if trial_id in self._in_doubt:
            run = self._client().get_run(self._run_id(trial_id))
            if _is_empty(run):
                return  # not to be told from the other one yet
            keys = ("dualsweep.sweep", "dualsweep.sweep_id", "dualsweep.kind", "dualsweep.trial", "mlflow.parentRunId")
            self._find_run({key: run.data.tags[key] for key in keys if key in run.data.tags})
            self._in_doubt.discard(trial_id)

    def _describe(self, trial_id: str | None, params: Mapping[str, str], tags: Mapping[str, str], reopen: bool) -> None:
        """Parameters not there yet (MLflow never changes one; a changed one becomes a tag), tags, and the status."""
        from mlflow.entities import Param

        run_id = self._run_id(trial_id)
        run = self._client().get_run(run_id)
        known, tags, new = run.data.params, dict(tags), []
        for key, value in params.items():
            if key not in known:
                new.append(Param(key, value))
            elif known[key] != value:
                tags[f"dualsweep.changed.{key}"] = value
        for start in range(0, len(new), 100):  # MLflow's limit of one call
            self._client().log_batch(run_id, params=new[start : start + 100])
        self._delivered["parameters"] += len(new)
        if trial_id is not None and "dualsweep.label" not in run.data.tags:
            tags["dualsweep.label"] = self._trials[trial_id][0]
        self._set_tags(run_id, tags, run.data.tags)
        if reopen and run.info.status != "RUNNING":
            self._client().update_run(run_id, status="RUNNING")

    def _log_rows(self, trial_id: str, rows: list[dict[str, Any]]) -> None:
        """Deliver and remove the rows from the front, so that a failure loses no progress.

        A step that a curve has already is left out, whoever brought it: a resume that had to go back to an older
        checkpoint makes the same numbers at another time, which MLflow would show as a second point.
        """
        from mlflow.entities import Metric

        run_id = self._run_id(trial_id)
        constraints = self._trials[trial_id][1]
        if trial_id not in self._newest_steps:
            known = self._client().get_run(run_id).data.to_proto().metrics
            self._newest_steps[trial_id] = {metric.key: metric.step for metric in known}
        newest = self._newest_steps[trial_id]
        while rows:
            count = max(1, METRICS_PER_BATCH // max(1, len(row_metrics(rows[0], constraints))))
            metrics = [
                Metric(key, value, int(row["wall_time"] * 1000), int(row["dual_step"]))
                for row in rows[:count]
                for key, value in row_metrics(row, constraints).items()
                if row["dual_step"] > newest.get(key, 0)
            ]
            try:
                for start in range(0, len(metrics), METRICS_PER_BATCH):
                    self._client().log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])
            except Exception:
                del self._newest_steps[trial_id]  # whether it arrived is not known: the server will be asked again
                raise
            newest |= {metric.key: metric.step for metric in metrics}
            self._delivered["rows"] += len({metric.step for metric in metrics})
            del rows[:count]

    def _log_result(self, trial_id: str, result: dict[str, Any], at: int) -> None:
        certificate = result.get("certificate") or {}
        tags = {
            "feasible": _FEASIBLE.get(certificate.get("verdict"), "undecided"),
            "dualsweep.status": str(result.get("status")),
            **{f"dualsweep.{key}": str(result[key]) for key in ("method", "unit") if key in result},
            "dualsweep.trial_kind": str(result.get("kind")),
            "dualsweep.label": str(result.get("label", trial_id)),
            **started_from(result.get("start")),
        }
        if result.get("stopped_by"):
            tags["dualsweep.stopped_by"] = result["stopped_by"]
        signs = [*(certificate.get("symptoms") or ())]
        signs += [f"multiplier of {name} at its bound" for name in certificate.get("saturated") or ()]
        if signs:
            tags["dualsweep.signs"] = "; ".join(signs)
        if result.get("reason"):
            tags["dualsweep.reason"] = result["reason"][:5000]
        if result.get("error"):
            tags["dualsweep.error"] = result["error"][-5000:]  # the end of a traceback says what happened
        step = int(result.get("dual_steps") or 0)
        self._delivered["results"] += self._log_final(trial_id, dict(_final_metrics(result)), tags, step=step, at=at)

    def _log_final(
        self, trial_id: str | None, metrics: Mapping[str, float], tags: Mapping[str, str], *, step: int, at: int
    ) -> bool:
        """Metrics that the run does not show with this value already, and tags. Returns: whether there were any.

        `at`, in ms since 1970, is the same for every try, so that one that arrived without an answer is no second point.
        """
        from mlflow.entities import Metric

        run_id = self._run_id(trial_id)
        run = self._client().get_run(run_id)
        shown, model_id = run.data.metrics, self._model_ids.get(trial_id)
        new = []
        for name, value in metrics.items():
            key = "/".join(clean_name(part) for part in name.split("/"))
            if value is not None and math.isfinite(value) and shown.get(key) != value:
                new.append(Metric(key, float(value), at, step, model_id=model_id))
        for start in range(0, len(new), METRICS_PER_BATCH):
            self._client().log_batch(run_id, metrics=new[start : start + METRICS_PER_BATCH])
        return bool(self._set_tags(run_id, tags, run.data.tags) + len(new))

    def _log_artifacts(self, trial_id: str, result: dict[str, Any], trial_dir: Path | None) -> None:
        files = [trial_dir / name for name in ("samples.npy", "trace.parquet")] if trial_dir is not None else []
        fingerprint = _fingerprint(*files, also=json.dumps(result, sort_keys=True))
        upload = partial(self._upload_artifacts, trial_id, result, trial_dir)
        self._once(trial_id, "artifacts", "trial artifacts", fingerprint, upload)

    def _upload_artifacts(self, trial_id: str, result: dict[str, Any], trial_dir: Path | None) -> None:
        client, run_id = self._client(), self._run_id(trial_id)
        if result.get("error"):
            client.log_text(run_id, result["error"], "error.txt")
        client.log_text(run_id, json.dumps(result, indent=1), "result.json")
        if trial_dir is None:
            return
        if (trial_dir / "samples.npy").exists():
            samples = np.load(trial_dir / "samples.npy", allow_pickle=False)
            if samples.ndim == 4 and samples.shape[1] in (1, 3) and len(samples):
                client.log_image(run_id, _sample_grid(samples), "figures/samples.png")
            elif samples.ndim == 2 and len(samples):
                from dualsweep.orchestration.sample_figures import scatter  # matplotlib, which images do not need

                client.log_figure(run_id, scatter(samples), "figures/samples.png")
                client.log_artifact(run_id, str(trial_dir / "samples.npy"))
        if (trial_dir / "trace.parquet").exists():
            client.log_artifact(run_id, str(trial_dir / "trace.parquet"), "trace")

    def _upload_file(self, trial_id: str | None, path: Path) -> None:
        self._client().log_artifact(self._run_id(trial_id), str(path))

    def _upload_folder(self, trial_id: str | None, folder: Path, place: str) -> None:
        self._client().log_artifacts(self._run_id(trial_id), str(folder), place)

    def _once(self, trial_id: str | None, what: str, kind: str, fingerprint: str, upload: Callable[[], None]) -> None:
        """Upload unless the run's tag says that MLflow has it; the tag comes last, so that it never lies."""
        run_id, tag = self._run_id(trial_id), f"{HAS}{clean_name(what)}"
        tags = self._client().get_run(run_id).data.tags
        if tags.get(tag) != fingerprint:
            upload()
            self._set_tags(run_id, {tag: fingerprint}, tags)
            self._delivered[kind] += 1

    def _log_model(self, trial_id: str, result: dict[str, Any], folder: Path) -> None:
        """A pipeline becomes a logged model that can sample; any other folder plain artifacts under `model/`.

        A composed law is the second kind: its pipeline alone would draw from another law.
        """
        client, run_id = self._client(), self._run_id(trial_id)
        index = folder / "model_index.json"
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.exists() else None
        if kind not in PIPELINES or (folder / "composition.json").exists():
            upload = partial(self._upload_folder, trial_id, folder, "model")
            self._once(trial_id, "model", "models", _fingerprint(folder), upload)
            return
        from mlflow.entities import LoggedModelOutput

        fingerprint = _fingerprint(folder)
        experiment_id = self._experiment()
        found = client.search_logged_models([experiment_id], f"name = 'model' AND source_run_id = '{run_id}'")
        model = found[0] if found else client.create_logged_model(experiment_id, "model", source_run_id=run_id)
        # The fingerprint is the last thing written: a model that has it is whole.
        if model.tags.get("dualsweep.sha256") != fingerprint:
            with tempfile.TemporaryDirectory() as scratch:
                _save_pyfunc(folder, Path(scratch), model, run_id)
                client.log_model_artifacts(model.model_id, str(Path(scratch) / "model"))
            client.finalize_logged_model(model.model_id, "READY")
            client.set_logged_model_tags(model.model_id, {"dualsweep.sha256": fingerprint})
            self._delivered["models"] += 1
        outputs = client.get_run(run_id).outputs
        if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            step = int(result.get("dual_steps") or 0)
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        self._model_ids[trial_id] = model.model_id

    def _set_tags(self, run_id: str, tags: Mapping[str, str], known: Mapping[str, str]) -> int:
        """Set the tags that are not `known` with this value. Returns: how many."""
        from mlflow.entities import RunTag

        wanted = {clean_name(key): str(value)[:5000] for key, value in tags.items()}
        entries = [RunTag(key, value) for key, value in wanted.items() if known.get(key) != value]
        for start in range(0, len(entries), 100):
            self._client().log_batch(run_id, tags=entries[start : start + 100])
        return len(entries)

    def _end_run(self, trial_id: str | None, status: str) -> None:
        run_id = self._run_id(trial_id)
        if self._client().get_run(run_id).info.status != status:  # a repetition must not move the end time
            self._client().set_terminated(run_id, status)
            self._delivered["run ends"] += 1
        for owner in [trial_id] if trial_id is not None else list(self._in_doubt):
            self._settle(owner)


def started_from(start: Mapping[str, Any] | None) -> dict[str, str]:
    """The tag that names the trial whose model and multipliers a trial started from; none for a cold start."""
    return {"dualsweep.started_from": start["trial"]} if start else {}


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as MLflow keeps them: keys joined by dots, lists as JSON, at most 6000 characters."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield clean_name(f"{prefix}{key}"), text[:6000]


def _final_metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a result.json as ``final/...`` metrics; what was not measured is left out."""
    for key in ("primal_steps", "dual_steps", "wall_seconds", "exact_objective"):
        yield f"final/{key}", result.get(key)
    objective, certificate = result.get("objective") or {}, result.get("certificate") or {}
    for key in ("level", "duality_gap", "duality_gap_stderr", "worst_violation"):
        yield f"final/{key}", certificate.get(key)
    yield from (("final/objective", objective.get("value")), ("final/objective_stderr", objective.get("stderr")))
    for entry in result.get("constraints", ()):
        for key in ("metric", "metric_stderr", "user_value", "user_stderr", "violation", "stderr", "threshold"):
            name = "violation_stderr" if key == "stderr" else key
            yield metric_key(f"final/{name}", entry["name"]), entry.get(key)
    for key in ("multipliers", "averaged_multipliers", "exact_multipliers", "relaxations"):
        for name, value in (result.get(key) or {}).items():
            yield metric_key(f"final/{key[:-1]}", name), value
    histogram = result.get("histogram") or {}
    for name, count in zip(histogram.get("classes", ()), histogram.get("counts", ()), strict=True):
        yield metric_key("final/share", str(name)), count / histogram["total"]
    yield "final/classifier_accuracy", histogram.get("classifier_accuracy")


def _sample_grid(samples: np.ndarray) -> Image.Image:
    """The first (at most 64) samples, shape (n, 1 or 3, h, w) in [-1, 1], as one picture, small images enlarged."""
    count = min(len(samples), 64)
    columns = math.ceil(math.sqrt(count))
    scale = max(1, 64 // max(samples.shape[2:]))
    pixels = np.clip((np.nan_to_num(samples[:count]) + 1) * 127.5, 0, 255).astype(np.uint8)
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)
    height, width = pixels.shape[1] + 2, pixels.shape[2] + 2
    grid = np.full((math.ceil(count / columns) * height, columns * width, pixels.shape[3]), 255, dtype=np.uint8)
    for index, tile in enumerate(pixels):
        top, left = index // columns * height, index % columns * width
        grid[top : top + height - 2, left : left + width - 2] = tile
    return Image.fromarray(grid.squeeze(-1) if grid.shape[2] == 1 else grid)


def _save_pyfunc(folder: Path, scratch: Path, model: Any, run_id: str) -> None:
    """Write the model in MLflow's layout to `scratch`/model: this pipeline, pyfunc_model.py, an explicit signature."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    size = unet["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    defaults = {"num_samples": 16, "num_inference_steps": schedule["num_train_timesteps"], "seed": 0}
    mlflow.pyfunc.save_model(
        str(scratch / "model"),
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"pipeline": str(folder.resolve())},  # MLflow follows no link
        signature=ModelSignature(
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, unet["out_channels"], height, width))]),
            params=ParamSchema([ParamSpec(name, DataType.long, value) for name, value in defaults.items()]),
        ),
        # Explicit, for MLflow would otherwise load the model in a second process to find out.
        pip_requirements=[
            f"{package}=={importlib.metadata.version(package).split('+')[0]}"
            for package in ("mlflow", "torch", "diffusers", "numpy", "safetensors")
        ],
        mlflow_model=Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
        ),
    )


def _fingerprint(*paths: Path, also: str = "") -> str:
    """sha256 over the names and contents of files, of all files of folders, and a text; a missing file counts nothing."""
    digest = hashlib.sha256(also.encode())
    for root in paths:
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        for path in files:
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _is_empty(run: Any) -> bool:
    """Whether nothing was written to a run yet."""
    return not (run.data.metrics or run.data.params)


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return "unknown"
