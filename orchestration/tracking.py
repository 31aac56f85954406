"""MLflow behind the sweep: a parent run a sweep, a child run a trial, written by a background thread.

The sweep never waits for MLflow and never fails because of it. What cannot be delivered stays in memory and is tried
again; what is left when the tracker closes can be delivered later from the sweep directory with `sync_sweep`, since
every delivery may be repeated: runs are found again by their tags, MLflow drops a metric that repeats key, value,
timestamp and step, and artifacts overwrite themselves. MLflow is imported only where it is used: it takes 2 s.
"""

import copy
import getpass
import hashlib
import importlib.metadata
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dualsweep.orchestration.outbox import GiveUp, Item, Outbox, Undelivered
from dualsweep.orchestration.trace import clean_name, metric_key, read_trace, read_trace_names, row_metrics
from dualsweep.orchestration.tracking_uri import SQLITE, check_tracking, mlflow_client, resolve_tracking_uri
from dualsweep.orchestration.units import calibration_values, unit_of

__all__ = ["Tracker", "Undelivered", "check_tracking", "resolve_tracking_uri", "sync_sweep"]

METRICS_PER_BATCH = 1000  # MLflow's own limit of one `log_batch`
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
        self._model_ids: dict[str, str] = {}

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
                self._client().log_artifact(self._run_id(None), str(path))

        self._put("start", None, deliver)

    def log_calibration(self, calibration: Mapping[str, Any]) -> None:
        """What the pretrained model measures, in the user's unit: metrics ``pretrained/<constraint>`` of the parent run."""
        unit = unit_of(calibration["unit"])
        metrics = {}
        for name, value, stderr, _ in calibration_values(calibration, unit):
            metrics[metric_key("pretrained", name)] = value
            metrics[metric_key("pretrained_stderr", name)] = stderr

        def deliver() -> None:
            self._describe(None, {"pretrained.unit": unit.name}, {}, reopen=False)
            self._log_final(None, metrics, {}, step=0)

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
        """Hand over trace rows; they become metrics at step `dual_step` and time `wall_time`."""
        item = Item(what="rows", trial_id=trial_id, rows=[dict(row) for row in rows])
        item.deliver = lambda: self._log_rows(trial_id, item.rows)
        self._outbox.put(item)

    def finish_trial(self, trial_id: str, result: Mapping[str, Any], trial_dir: Path | None) -> None:
        """The model, final metrics and tags, artifacts and the status of a trial, from its result.json and folder.

        Four items, so that a model that cannot be stored does not hide the result. Rows given up before are
        delivered from `trace.parquet`.
        """
        result = copy.deepcopy(dict(result))
        status = _TRIAL_STATUS.get(result.get("status", ""), "FAILED")
        self._unfinished.discard(trial_id)
        if trial_dir is not None and (trial_dir / "model").is_dir():
            self._put("model", trial_id, lambda: self._log_model(trial_id, result, trial_dir / "model"))
        self._put("result", trial_id, lambda: self._log_result(trial_id, result))
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

        def deliver() -> None:
            self._log_final(None, metrics or {}, {"dualsweep.status": status, **(tags or {})}, step=0)
            if report_dir is not None:
                self._client().log_artifacts(self._run_id(None), str(report_dir), "report")

        for trial_id in sorted(self._unfinished):
            self._put("status", trial_id, lambda trial_id=trial_id: self._end_run(trial_id, "KILLED"))
        self._unfinished.clear()
        self._put("report", None, deliver)
        self._put("status", None, lambda: self._end_run(None, _SWEEP_STATUS[status]))

    def undelivered(self) -> list[Undelivered]:
        """What MLflow has not got by now: still queued, or given up with its error."""
        return self._outbox.undelivered()

    def flush(self, timeout: float) -> int:
        """Wait until everything is delivered or given up, at most `timeout` seconds.

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
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        experiment_id = self._experiment()
        found = self._client().search_runs(
            [experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"]
        )
        if found:
            self._run_ids[trial_id] = found[0].info.run_id
        else:
            tags |= {"mlflow.source.name": "dualsweep", "mlflow.user": _user_name()}
            self._run_ids[trial_id] = self._client().create_run(experiment_id, run_name=name, tags=tags).info.run_id
        return self._run_ids[trial_id]

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
        if trial_id is not None:
            tags["dualsweep.label"] = self._trials[trial_id][0]
        self._set_tags(run_id, tags)
        if reopen and run.info.status != "RUNNING":
            self._client().update_run(run_id, status="RUNNING")

    def _log_rows(self, trial_id: str, rows: list[dict[str, Any]]) -> None:
        """Deliver and remove the rows from the front, so that a failure loses no progress."""
        from mlflow.entities import Metric

        run_id = self._run_id(trial_id)
        constraints = self._trials[trial_id][1]
        while rows:
            count = max(1, METRICS_PER_BATCH // max(1, len(row_metrics(rows[0], constraints))))
            metrics = [
                Metric(key, value, int(row["wall_time"] * 1000), int(row["dual_step"]))
                for row in rows[:count]
                for key, value in row_metrics(row, constraints).items()
            ]
            for start in range(0, len(metrics), METRICS_PER_BATCH):
                self._client().log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])
            del rows[:count]

    def _log_result(self, trial_id: str, result: dict[str, Any]) -> None:
        certificate = result.get("certificate") or {}
        tags = {
            "feasible": _FEASIBLE.get(certificate.get("verdict"), "undecided"),
            "dualsweep.status": str(result.get("status")),
            **{f"dualsweep.{key}": str(result[key]) for key in ("method", "unit") if key in result},
            "dualsweep.trial_kind": str(result.get("kind")),
        }
        signs = [*(certificate.get("symptoms") or ())]
        signs += [f"multiplier of {name} at its bound" for name in certificate.get("saturated") or ()]
        if signs:
            tags["dualsweep.signs"] = "; ".join(signs)
        if result.get("error"):
            tags["dualsweep.error"] = result["error"][-5000:]  # the end of a traceback says what happened
        self._log_final(trial_id, dict(_final_metrics(result)), tags, step=int(result.get("dual_steps") or 0))

    def _log_final(
        self, trial_id: str | None, metrics: Mapping[str, float], tags: Mapping[str, str], *, step: int
    ) -> None:
        """Metrics that the run does not show with this value already, and tags."""
        from mlflow.entities import Metric

        run_id = self._run_id(trial_id)
        shown = self._client().get_run(run_id).data.metrics
        now, model_id = int(time.time() * 1000), self._model_ids.get(trial_id)
        new = []
        for name, value in metrics.items():
            key = "/".join(clean_name(part) for part in name.split("/"))
            if value is not None and math.isfinite(value) and shown.get(key) != value:
                new.append(Metric(key, float(value), now, step, model_id=model_id))
        for start in range(0, len(new), METRICS_PER_BATCH):
            self._client().log_batch(run_id, metrics=new[start : start + METRICS_PER_BATCH])
        self._set_tags(run_id, tags)

    def _log_artifacts(self, trial_id: str, result: dict[str, Any], trial_dir: Path | None) -> None:
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
            if lost := self._outbox.take_lost_rows(trial_id):
                try:
                    self._log_rows(trial_id, read_trace(trial_dir / "trace.parquet"))
                except BaseException:
                    self._outbox.give_back(lost)
                    raise

    def _log_model(self, trial_id: str, result: dict[str, Any], folder: Path) -> None:
        """A pipeline becomes a logged model that can sample; any other folder plain artifacts under `model/`.

        A composed law is the second kind: its pipeline alone would draw from another law.
        """
        client, run_id = self._client(), self._run_id(trial_id)
        index = folder / "model_index.json"
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.exists() else None
        if kind not in PIPELINES or (folder / "composition.json").exists():
            client.log_artifacts(run_id, str(folder), "model")
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
        outputs = client.get_run(run_id).outputs
        if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            step = int(result.get("dual_steps") or 0)
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        self._model_ids[trial_id] = model.model_id

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(clean_name(key), str(value)[:5000]) for key, value in tags.items()]
        for start in range(0, len(entries), 100):
            self._client().log_batch(run_id, tags=entries[start : start + 100])

    def _end_run(self, trial_id: str | None, status: str) -> None:
        run_id = self._run_id(trial_id)
        if self._client().get_run(run_id).info.status != status:  # a repetition must not move the end time
            self._client().set_terminated(run_id, status)


def sync_sweep(sweep_dir: Path, tracker: Tracker) -> list[str]:
    """Deliver again everything a sweep left in its (local) directory; the ids of the trials handed over.

    Only queues: `tracker.flush(timeout)` tells what arrived. A trial without result.json gets the rows of its trace
    and keeps its status. The sweep itself is ended only when every point in points.json has its result.
    Raises: ValueError naming a file that cannot be read; nothing is delivered then.
    """
    config = _load(sweep_dir / "sweep.yaml", yaml.safe_load) or {}
    points = {point["trial_id"]: point for point in _load(sweep_dir / "points.json", json.loads) or []}
    found: dict[str, tuple[dict[str, Any], tuple[str, ...], list[dict[str, Any]], Path]] = {}
    for folder in sorted(path for path in (sweep_dir / "trials").glob("*") if path.is_dir()):
        result = _load(folder / "result.json", json.loads) or {}
        rows, names = [], tuple(entry["name"] for entry in result.get("constraints", ()))
        if (folder / "trace.parquet").exists():
            rows, names = read_trace(folder / "trace.parquet"), read_trace_names(folder / "trace.parquet")[0]
        if result or rows:
            found[folder.name] = (result, names, rows, folder)
    tracker.start_sweep(config, files=[path for path in [sweep_dir / "sweep.yaml"] if path.exists()], reopen=False)
    calibration = next((result["calibration"] for result, *_ in found.values() if result.get("calibration")), None)
    if calibration is not None:
        tracker.log_calibration(calibration)
    for trial_id, (result, names, rows, folder) in found.items():
        point = points.get(trial_id, {}) | result
        params = {key: point[key] for key in ("kind", "method", "unit", "thresholds") if key in point}
        tracker.start_trial(trial_id, point.get("label", trial_id), params, constraints=names, reopen=False)
        tracker.log_rows(trial_id, rows)
        if result:
            tracker.finish_trial(trial_id, result, folder)
    done = {trial_id: result for trial_id, (result, *_) in found.items() if result}
    if done and set(points) <= set(done):
        failed = any(_TRIAL_STATUS.get(result.get("status", "")) != "FINISHED" for result in done.values())
        report = sweep_dir / "report"
        tracker.finish_sweep(report if report.is_dir() else None, "failed" if failed else "completed")
    return list(found)


def _load(path: Path, parse: Callable[[str], Any]) -> Any:
    """The parsed file, or None if there is none."""
    if not path.exists():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); restore it, or move it away to leave it out") from error


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


def _fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return "unknown"
