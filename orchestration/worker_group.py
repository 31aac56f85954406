"""A slot's Ray Train run: one worker group that outlives the trials it trains."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.dual_server import find_dual_server
from dualsweep.orchestration.storage import store_of

CLOSE_TIMEOUT_S = 60.0


def train_loop(loop_config: dict[str, Any]) -> None:
    """Train function of every worker."""
    from dualsweep.trainers.worker import serve  # here: the trial's driver and Train's controller load this file too

    config = SweepConfig.from_dict(loop_config["config"])
    serve(
        find_dual_server(Path(loop_config["folder"])),
        loop_config["slot"],
        config.to_dict(),
        config.data,
        num_threads=config.compute.cpus_per_worker,
        store=store_of(config.storage, Path(loop_config["folder"]).parent),
    )


class WorkerGroup:
    """Starts the group in a thread; `error` holds what ended it too early."""

    def __init__(self, slot: str, config: SweepConfig, folder: Path) -> None:
        self.error: BaseException | None = None
        run = _in_process if config.compute.workers == 0 else _ray_train
        job = {"slot": slot, "config": config.to_dict(), "folder": str(folder)}
        self._thread = threading.Thread(
            target=self._guard, args=(run, job, config, folder), daemon=True, name=f"worker-group-{slot}"
        )
        self._thread.start()

    def _guard(
        self,
        run: Callable[[dict[str, Any], SweepConfig, Path], None],
        job: dict[str, Any],
        config: SweepConfig,
        folder: Path,
    ) -> None:
        try:
            run(job, config, folder)
        except BaseException as error:  # noqa: BLE001  (a thread's exception is lost unless kept; the trial raises it)
            self.error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until the group has ended and its placement group is gone."""
        self._thread.join(CLOSE_TIMEOUT_S)


def _in_process(job: dict[str, Any], config: SweepConfig, folder: Path) -> None:
    train_loop(job)


def _ray_train(job: dict[str, Any], config: SweepConfig, folder: Path) -> None:
    compute = config.compute
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    workers = (compute.fewest_workers, compute.most_workers) if compute.elastic else compute.workers
    if compute.elastic:
        # How long room that is no longer there is waited for. Train hands this variable on to its controller.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(compute.restart_timeout_s)
    trainer = _trainer_class(grouped=compute.most_workers > 1)(
        train_loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers,
            resources_per_worker=resources,
            use_gpu=compute.gpus_per_worker > 0,
            elastic_resize_monitor_interval_s=compute.resize_interval_s,
        ),
        run_config=RunConfig(
            name=f"slot-{job['slot']}",
            storage_path=str(folder / "train"),
            # One run serves many trials, so it may be restarted often; the ledger counts failures of each trial.
            # An elastic group whose start timed out tries again, as often as nodes die.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1 if compute.elastic else 3),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    trainer.fit()


def _trainer_class(*, grouped: bool) -> type[DataParallelTrainer]:
    """Ray Train's trainer, without the processes and imports that the group has no use for.

    A worker alone needs no process group, and TorchTrainer would bring torch into Tune's actor and the controller for it.
    Ray Data is not used, so that its manager, a process for each group, is left out; where Ray makes its callbacks elsewhere,
    it comes along, which costs two seconds of a processor and nothing else.
    """
    parent = DataParallelTrainer
    if grouped:
        from ray.train.torch import TorchTrainer as parent

    class Trainer(parent):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if type(callback).__name__ != "DatasetsCallback"]

    return Trainer
