"""Whether a long sweep stays flat: memory, file descriptors and processes over many trials of a tiny model.

A sweep of the digits runs its trials on two warm worker groups of local Ray. Every second the driver, the DualServer and the
workers are looked at (unique memory, open files); a growth is the median of the last tenth of the trials, while they run, over
the median of those from the 20th to the 30th. The report, which draws every trial at the end, is told apart (`*_in_the_end`).
Afterwards nothing that the sweep started may be left.

    python benchmarks/long_sweep.py [--trials 200]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import yaml
from _harness import closing_line, own_folder

from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.orchestration.journal import read_journal

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_fairness.yaml"
ROLES = {"dual_server": "ray::DualServer", "workers": "ray::RayTrainWorker", "trials": "ray::ResourceTrainable"}
SETTLED = 20  # trials that may still fill caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    with own_folder() as folder:
        seen, left, seconds = watch(folder, options.trials)
    figures = {"trials": options.trials, "seconds": seconds, "left_running": left}
    for name in sorted({name for _, values in seen for name in values}):
        table = [(done, values[name]) for done, values in seen if name in values]
        early = np.median([value for done, value in table if SETTLED <= done < 1.5 * SETTLED])
        late = np.median([value for done, value in table if 0.9 * options.trials <= done < options.trials])
        end = max((value for done, value in table if done >= options.trials), default=0.0)  # 0: gone by then
        tenths = [np.median([value for done, value in table if 10 * done // options.trials == i]) for i in range(10)]
        course = " ".join(f"{value:.0f}" for value in tenths)
        print(f"{name:22} {early:10.1f} -> {late:10.1f}  ({late / early:.3f}); by tenths {course}; in the end {end:.1f}")
        figures |= {f"{name}_growth": late / early, f"{name}_in_the_end": end}
    closing_line("long_sweep", figures)


def watch(folder: Path, trials: int) -> tuple[list[tuple[int, dict[str, float]]], int, float]:
    """Trials done and what was seen then; processes left afterwards; seconds."""
    path = folder / "long.yaml"
    path.write_text(yaml.safe_dump(sweep_config(folder, trials).to_dict()), encoding="utf-8")
    start, seen, family = time.monotonic(), [], set()
    with open(folder / "driver.txt", "w", encoding="utf-8") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "dualsweep", "sweep", str(path), "--address", "local"],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    process = psutil.Process(driver.pid)
    while driver.poll() is None:
        try:
            children = process.children(recursive=True)
            family |= set(children)
            seen.append((trials_done(folder / "runs" / "long" / "journal.jsonl"), look(process, children)))
        except psutil.NoSuchProcess:
            continue  # between the list and the look at it
        time.sleep(1.0)
    seconds = time.monotonic() - start
    if driver.returncode != 0:
        raise RuntimeError(f"the sweep ended with {driver.returncode}:\n{(folder / 'driver.txt').read_text()[-3000:]}")
    _, alive = psutil.wait_procs(list(family), timeout=20)
    return seen, len(alive), seconds


def look(driver: psutil.Process, children: list[psutil.Process]) -> dict[str, float]:
    """Megabytes, open files and processes of every role that is there."""
    groups = {"driver": [driver]}
    for role, title in ROLES.items():
        groups[role] = [child for child in children if child.name().startswith(title[:15])]
    found: dict[str, float] = {"processes": 1 + len(children)}
    for role, members in groups.items():
        if members:
            found[f"{role}_megabytes"] = sum(p.memory_full_info().uss for p in members) / 2**20 / len(members)
            found[f"{role}_files"] = sum(p.num_fds() for p in members) / len(members)
    return found


def trials_done(journal: Path) -> int:
    if not journal.exists():
        return 0
    return sum(record["kind"] == "end" and record["trial"] != "pretrained" for record in read_journal(journal))


def sweep_config(folder: Path, trials: int) -> SweepConfig:
    thresholds = np.linspace(0.02, 0.2, trials).round(5).tolist()
    overrides = [
        "name=long", f"storage={folder / 'runs'}", "primal.steps=20", "primal.warmup_steps=2", "primal.batch_size=16",
        "primal.constraint_batch_size=4", "pretrain.steps=20", "pretrain.warmup_steps=2", "measure.num_samples=16",
        "measure.window=1", "measure.num_sampling_steps=4", "dual.primal_steps_per_dual_step=1", "evaluation.num_samples=64",
        "evaluation.noise_levels=4", "model.channels=[8, 16]", "model.norm_groups=4", "baselines.unconstrained=false",
        "baselines.fixed_weights=[]", "compute.concurrent_trials=2", f"thresholds.grid.minority={thresholds}",
    ]  # fmt: skip
    return load_config(EXAMPLE, overrides, environment=False)


if __name__ == "__main__":
    main()
