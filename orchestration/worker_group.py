"""A slot's Ray Train run: one worker group that outlives the trials it trains."""

import asyncio
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.dual_server import find_dual_server
from dualsweep.orchestration.storage import store_of

CLOSE_TIMEOUT_S = 60.0
_UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")


def train_loop(loop_config: dict[str, Any]) -> None:
    """Train function of every worker."""
    from dualsweep.trainers.lean_imports import import_diffusers  # here: Tune's actor loads this file, too
    from dualsweep.trainers.worker import serve

    config = SweepConfig.from_dict(loop_config["config"])
    if not (config.model.prompts or config.model.autoencoder):
        import_diffusers()
    serve(
        find_dual_server(Path(loop_config["folder"])),
        loop_config["slot"],
        config.to_dict(),
        config.data,
        num_threads=config.compute.cpus_per_worker,
        store=store_of(config.storage, Path(loop_config["folder"]).parent),
    )


class WorkerGroup:
    """Starts the group in a thread; `error` holds what ended it too early.

    Args: own_ray: whether Ray was started for this sweep alone, so that nobody else asks it for room.
    """

    def __init__(self, slot: str, config: SweepConfig, folder: Path, *, own_ray: bool) -> None:
        self.error: BaseException | None = None
        job = {"slot": slot, "config": config.to_dict(), "folder": str(folder)}
        if config.compute.workers == 0:
            run = partial(train_loop, job)
        else:
            run = partial(_ray_train, job, config, folder, own_ray=own_ray)
        self._thread = threading.Thread(target=self._guard, args=(run,), daemon=True, name=f"worker-group-{slot}")
        self._thread.start()

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001  (a thread's exception is lost unless kept; the trial raises it)
            self.error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until the group has ended and its placement group is gone."""
        self._thread.join(CLOSE_TIMEOUT_S)


def _ray_train(job: dict[str, Any], config: SweepConfig, folder: Path, *, own_ray: bool) -> None:
    compute = config.compute
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    workers = (compute.fewest_workers, compute.most_workers) if compute.elastic else compute.workers
    if compute.elastic:
        # How long room that is no longer there is waited for. Train hands this variable on to its controller.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(compute.restart_timeout_s)
    trainer = _trainer_class(grouped=compute.most_workers > 1, uncontended=own_ray and not compute.elastic)(
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


class _UnannouncedSize(FixedScalingPolicy):
    """A group of fixed size that asks for its room by its placement group alone.

    Train announces it to an actor besides, and waits for that to start, which reckons the room of elastic groups and of Ray Data.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        return None

    def _maybe_send_resource_request(self) -> None:
        return None


def _trainer_class(*, grouped: bool, uncontended: bool) -> type[DataParallelTrainer]:
    """Ray Train's trainer, without the processes and imports that a slot has no use for.

    Each of them would cost two seconds of a processor to start and 1 % of one for as long as the group lives:

    * the controller of the group runs in the thread that called `fit`, in Tune's actor, which lives as long as it should;
    * nobody watches over the controller to free its placement group: the sweep's driver does (`free_left_groups`);
    * Ray Data's manager is left out, since no data comes from there;
    * where nobody else asks for room (`uncontended`), nobody is told of ours;
    * a worker alone needs no process group, for which TorchTrainer would bring torch into Tune's actor.

    Where another Ray makes its callbacks or its controller elsewhere, these come along, and nothing else changes.
    """
    parent = DataParallelTrainer
    if grouped:
        from ray.train.torch import TorchTrainer as parent

    class Trainer(parent):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if type(callback).__name__ not in _UNUSED_CALLBACKS]

        def _initialize_and_run_controller(self, **given: Any) -> Any:
            if uncontended:
                given["scaling_policy"] = _UnannouncedSize(self.scaling_config)
            if ray.get_runtime_context().get_actor_id() is None:  # a controller is an actor, or lives in one
                return super()._initialize_and_run_controller(**given)
            controller = TrainController(**given)
            asyncio.run(controller.run())
            return controller.get_result()

    return Trainer
