"""Bad input: one error that names field, value and remedy, exit code 2, no Ray process and not a byte written.

Every case goes through the command line's entry point. The good side is tested too: what a case breaks is accepted whole.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from rich.console import Console

from dualsweep import cli
from dualsweep.orchestration import cluster, sweep
from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.orchestration.journal import Journal
from dualsweep.orchestration.preflight import preflight
from dualsweep.orchestration.storage import is_running

EXAMPLES = Path(__file__).parents[2] / "examples"
NAN, INF = float("nan"), float("inf")


class RayStarted(BaseException):
    """Raised in place of starting Ray; nothing in the code under test may catch it."""


class Desk:
    """A user's folder with the terminal in it: sweep files, data, storage, and what a command says."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.storage, self._patch = root, root / "runs", monkeypatch
        self.work = root / "work"
        self.work.mkdir()
        monkeypatch.chdir(self.work)

    def config(self) -> dict:
        """A sweep that would run: digits, one minority class, one threshold."""
        return {
            "name": "small",
            "storage": str(self.storage),
            "data": {"dataset": "digits", "minority": {"classes": [4, 5], "keep": 0.1}},
            "thresholds": {"unit": "share", "grid": {"minority": [0.1]}},
            "compute": {"workers": 1},
        }

    def write(self, values: dict | str) -> str:
        path = self.work / "sweep.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    def call(self, *argv: str) -> tuple[int, str]:
        """Exit code and everything on stderr of one command, through the installed entry point."""
        said, shown = io.StringIO(), io.StringIO()
        self._patch.setattr(cli, "errors", Console(file=said))
        self._patch.setattr(cli, "console", Console(file=shown))
        self._patch.setattr(sys, "argv", ["dualsweep", *map(str, argv)])
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, said.getvalue()

    def refused(self, *argv: str) -> str:
        """The one error of a command that must change nothing."""
        before, here, path = self.everything(), os.getcwd(), list(sys.path)
        code, said = self.call(*argv)
        assert code == 2, said
        assert said.startswith("error ") and len(said.splitlines()) == 1, said
        assert "Traceback" not in said
        assert self.everything() == before
        assert (os.getcwd(), sys.path) == (here, path)
        assert not ray.is_initialized()
        return said

    def everything(self) -> dict[str, bytes | None]:
        """Every file and folder with its content."""
        return {
            str(p.relative_to(self.root)): p.read_bytes() if p.is_file() else None for p in sorted(self.root.rglob("*"))
        }

    def finished_config(self, name: str = "done") -> SweepConfig:
        """A sweep folder as an interrupted run leaves it: resolved config, points, journal of one begun trial."""
        config = SweepConfig.from_dict({**self.config(), "name": name})
        folder = self.storage / name
        folder.mkdir(parents=True)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        (folder / "driver.lock").touch()
        points = [
            {
                "trial_id": "share-1",
                "label": "minority >= 0.1",
                "kind": "constrained",
                "thresholds": {"digit_4": 0.1, "digit_5": 0.1},
                "fixed_weight": None,
            }
        ]
        (folder / "points.json").write_text(json.dumps(points), encoding="utf-8")
        journal = Journal(folder / "journal.jsonl")
        journal.append(
            [
                {"kind": "reopen", "trial": "share-1"},
                {"kind": "directive", "trial": "share-1", "directive": "stop"},
                {"kind": "reopen", "trial": "share-1"},
            ]
        )
        journal.close()
        return config


@pytest.fixture
def desk(tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "DUALSWEEP_STORAGE", "DUALSWEEP_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "no ray"))  # a Ray that someone runs on this machine is not ours

    def started(*args, **kwargs):
        raise RayStarted

    for owner, name in ((sweep, "start_ray"), (cluster, "start_ray"), (ray, "init")):
        monkeypatch.setattr(owner, name, started)
    before = dict(os.environ)  # a sweep that gets as far as Ray leaves settings for Ray's processes
    yield Desk(tmp_path, monkeypatch)
    os.environ.clear()
    os.environ.update(before)


def changed(values: dict, changes: dict) -> dict:
    """A copy with ``key.path`` entries replaced."""
    values = json.loads(json.dumps(values))
    for path, value in changes.items():
        at = values
        *outer, last = path.split(".")
        for key in outer:
            at = at.setdefault(key, {})
        at[last] = value
    return values


def pictures(count: int, size: int = 8) -> list[bytes]:
    """Encoded grey PNGs."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        with io.BytesIO() as stream:
            Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(stream, "PNG")
            encoded.append(stream.getvalue())
    return encoded


def write_parquet(
    path: Path, *, images: str = "image", labels: str = "label", first: bytes | None = None, size: int = 8
) -> str:
    """40 images of two classes in the Hugging Face layout; `first` stands in for the first image's bytes."""
    encoded = pictures(40, size)
    encoded[0] = first if first is not None else encoded[0]
    table = pa.table({images: [{"bytes": e, "path": None} for e in encoded], labels: [k % 2 for k in range(40)]})
    pq.write_table(table, path)
    return str(path)


def parquet_sweep(desk: Desk, path: str, **more) -> dict:
    data = {"dataset": "parquet", "path": path, "minority": {"classes": [1], "keep": 0.5}, **more}
    return {**desk.config(), "data": data}


# Values in the file. Each: what is changed, and what the error must say (field with its path, value, remedy).
VALUES = {
    "unknown key at the top": ({"sed": 3}, ["sed: unknown key", "did you mean 'seed'?"]),
    "unknown key in a section": ({"primal.stesp": 3}, ["primal.stesp: unknown key", "did you mean 'steps'?"]),
    "unknown key two levels down": (
        {"data.minority.kep": 0.1},
        ["data.minority.kep: unknown key", "did you mean 'keep'?"],
    ),
    "unknown key like no other": ({"compute.zzzzzz": 1}, ["compute.zzzzzz: unknown key", "known here:", "workers"]),
    "unknown key of the data": ({"data.datset": "digits"}, ["data.datset: unknown key", "did you mean 'dataset'?"]),
    "word for a number": ({"primal.steps": "many"}, ["primal.steps", "'many'", "integer"]),
    "number for a section": ({"data": 5}, ["data:", "5", "dictionary"]),
    "number for the minority's list": ({"data.minority.classes": 4}, ["data.minority.classes", "4", "tuple"]),
    "number for the name": ({"name": 7}, ["name", "7", "string"]),
    "no thresholds section": ({"thresholds": None}, ["thresholds", "None", "dictionary"]),
    "negative dual step size": (
        {"dual": {"rule": "ascent", "step_size": -0.1}},
        ["dual.step_size", "-0.1", "greater than 0"],
    ),
    "zero dual step size": ({"dual": {"rule": "ascent", "step_size": 0}}, ["dual.step_size", "0", "greater than 0"]),
    "NaN dual step size": ({"dual": {"rule": "ascent", "step_size": NAN}}, ["dual.step_size", "nan"]),
    "infinite dual step size": ({"dual": {"rule": "ascent", "step_size": INF}}, ["dual.step_size", "inf", "finite"]),
    "no dual step size": ({"dual": {"rule": "ascent"}}, ["dual", "'ascent'", "step_size", "add"]),
    "negative learning rate": ({"primal.lr": -1e-3}, ["primal.lr", "-0.001", "greater than 0"]),
    "infinite weight decay": ({"primal.weight_decay": INF}, ["primal.weight_decay", "inf", "finite"]),
    "infinite tolerance": ({"evaluation.tolerance": INF}, ["evaluation.tolerance", "inf", "finite"]),
    "infinite starting multiplier": ({"dual.step_size": 0.1, "dual.start": INF}, ["dual.start", "inf", "finite"]),
    "negative starting multiplier": (
        {"dual.step_size": 0.1, "dual.start": -1.0},
        ["dual.start", "-1.0", "greater than or equal to 0"],
    ),
    "share above 1": (
        {"thresholds.grid.minority": [0.1, 1.4]},
        ["thresholds.grid.minority[1]=1.4", "a share must be in (0, 1)"],
    ),
    "share of 0": (
        {"thresholds.grid.minority": [0.0]},
        ["thresholds.grid.minority[0]=0.0", "a share must be in (0, 1)"],
    ),
    "shares that sum to 1": (
        {"thresholds.grid.minority": [0.5]},
        ["thresholds.grid", "'digit_4': 0.5", "sum to 1", "lower them"],
    ),
    "loss below 0": (
        {"thresholds": {"unit": "loss", "grid": {"minority": [-0.1]}}},
        ["thresholds.grid.minority[0]=-0.1", "a loss must be > 0"],
    ),
    "loss of 0": (
        {"thresholds": {"unit": "loss", "grid": {"minority": [0.0]}}},
        ["thresholds.grid", "0.0", "a loss must be > 0"],
    ),
    "factor of a share": (
        {"thresholds.grid.minority": {"factor": [0.5]}},
        ["thresholds.grid.minority", "0.5", "give a number"],
    ),
    "empty grid axis": ({"thresholds.grid.minority": []}, ["thresholds.grid.minority=[]", "at least one value"]),
    "empty list of points": ({"thresholds": {"list": []}}, ["thresholds.list=[]", "at least one"]),
    "two forms at once": (
        {"thresholds.list": [{"minority": 0.1}]},
        ["thresholds", "exactly one of grid, list, random, search", "'grid', 'list'"],
    ),
    "no form": ({"thresholds": {"unit": "share"}}, ["thresholds", "exactly one of grid, list, random, search", "none"]),
    "unknown axis": (
        {"thresholds.grid": {"majority": [0.1]}},
        ["thresholds.grid.majority", "unknown axis", "minority"],
    ),
    "a class without a threshold": (
        {"thresholds.grid": {"digit_4": [0.1]}},
        ["thresholds.grid", "digit_5", "add an axis"],
    ),
    "the same point twice": (
        {"thresholds.grid.minority": [0.1, 0.1]},
        ["thresholds.grid", "minority >= 0.1", "give each point once"],
    ),
    "the same fixed weight twice": (
        {"baselines.fixed_weights": [0.3, 0.3]},
        ["baselines.fixed_weights", "0.3", "once"],
    ),
    "negative fixed weight": (
        {"baselines.fixed_weights": [-0.3]},
        ["baselines.fixed_weights", "-0.3", "greater than or equal to 0"],
    ),
    "linspace without a count": (
        {"thresholds.grid.minority": {"linspace": [0.1, 0.2]}},
        ["thresholds.grid.minority.linspace=[0.1, 0.2]", "give [lo, hi, number of values]"],
    ),
    "linspace of another name": (
        {"thresholds.grid.minority": {"lin": [0.1, 0.2, 3]}},
        ["thresholds.grid.minority=", "{linspace: [lo, hi, n]}"],
    ),
    "logspace that falls": (
        {"thresholds.grid.minority": {"logspace": [0.2, 0.1, 3]}},
        ["thresholds.grid.minority.logspace=[0.2, 0.1]", "lo must be below hi"],
    ),
    "random points without a range": (
        {"thresholds": {"random": {"points": 3, "axes": {"minority": [0.1]}}}},
        ["thresholds.random.axes.minority=[0.1]", "{uniform: [lo, hi]}"],
    ),
    "unknown key of a search": (
        {"thresholds": {"search": {"axis": 1, "axes": {}}}},
        ["thresholds.search.axis", "unknown key", "axes"],
    ),
    "search for no points": (
        {"thresholds": {"search": {"points": 0, "axes": {"minority": {"uniform": [0.1, 0.2]}}}}},
        ["thresholds.search.points=0", "at least 1"],
    ),
    "search with a negative seed": (
        {"thresholds": {"search": {"seed": -1, "axes": {"minority": {"uniform": [0.1, 0.2]}}}}},
        ["thresholds.search.seed=-1", "at least 0"],
    ),
    "unknown unit": (
        {"thresholds.unit": "percent"},
        ["thresholds.unit", "'percent'", "'share', 'loss', 'nats', 'likelihood_ratio' or 'reward'"],
    ),
    "unknown rule": ({"dual": {"rule": "adam"}}, ["dual.rule", "'adam'", "'ascent'"]),
    "resilient without its cost": (
        {"dual": {"rule": "resilient", "step_size": 0.1}},
        ["dual", "'resilient'", "relaxation_cost", "add"],
    ),
    "cost for a rule that takes none": (
        {"dual": {"rule": "ascent", "step_size": 0.1, "relaxation_cost": 1.0}},
        ["dual", "relaxation_cost", "'ascent'", "the known ones"],
    ),
    "unknown method": ({"method": "unlearning"}, ["method", "'unlearning'", "'fairness'"]),
    "no minority": ({"data.minority": None}, ["data.minority is missing", "fairness needs"]),
    "no class in the minority": ({"data.minority.classes": []}, ["data.minority.classes=()", "name a class"]),
    "unknown class": ({"data.minority.classes": [4, 11]}, ["data.minority.classes[1]=11", "not a class", "digit_9"]),
    "class twice": ({"data.minority.classes": [4, 4]}, ["data.minority.classes[1]=4", "given twice", "once"]),
    "keep above 1": ({"data.minority.keep": 1.5}, ["data.minority.keep=1.5", "fraction in (0, 1]"]),
    "keep of none": ({"data.minority.keep": 0}, ["data.minority.keep=0", "whole number >= 1"]),
    "keep of more than there are": ({"data.minority.keep": 100_000}, ["data", "digit_4", "100000"]),
    "nothing held out": ({"data.held_out": 0.0}, ["data.held_out=0.0", "between 0 and 1"]),
    "unknown data set": ({"data.dataset": "cifar"}, ["data.dataset='cifar'", "choose from"]),
    "missing data file": (
        {"data.dataset": "parquet", "data.path": "nowhere.parquet"},
        ["data.path=", "nowhere.parquet", "does not exist", "correct the path"],
    ),
    "data path too long": (
        {"data.dataset": "parquet", "data.path": "x" * 300},
        ["data.path=", "xxx", "does not exist", "correct the path"],
    ),
    "data file for bundled data": ({"data.path": "x.parquet"}, ["data.path=", "x.parquet", "remove it"]),
    "mixture without means": (
        {"data.dataset": "gaussian_mixture", "model.kind": "mlp"},
        ["data.means=None", "one entry a component"],
    ),
    "U-Net for vectors": ({"data.dataset": "gaussian_mixture"}, ["model.kind=unet", "use model.kind=mlp"]),
    "channels that do not divide": ({"model.channels": [12, 32]}, ["model.channels [12]", "norm_groups=8"]),
    "no channels": ({"model.channels": []}, ["model.channels is empty", "give at least one"]),
    "images that do not halve": (
        {"model.channels": [8, 8, 8, 8, 8]},
        ["model.channels=[8, 8, 8, 8, 8]", "8x8", "data.size"],
    ),
    "betas that fall": ({"schedule.beta_start": 0.5}, ["schedule.beta_end=0.02", "beta_start=0.5"]),
    "warm-up longer than the run": (
        {"primal.warmup_steps": 50, "primal.steps": 40},
        ["primal.warmup_steps=50", "smaller than steps=40"],
    ),
    "no dual step in the run": (
        {"dual": {"rule": "ascent", "step_size": 0.1, "primal_steps_per_dual_step": 5000}},
        ["dual.primal_steps_per_dual_step=5000", "primal.steps=1000"],
    ),
    "fp16 without a GPU": ({"primal.precision": "fp16"}, ["primal.precision=fp16", "needs a GPU", "bf16 or fp32"]),
    "two precisions": ({"primal.precision": "bf16"}, ["pretrain.precision=fp32", "primal.precision=bf16"]),
    "more workers than CPUs": (
        {"compute.workers": 512, "primal.num_shards": 1024, "pretrain.num_shards": 1024},
        ["compute.workers=512", "512 CPUs", "lower compute.workers"],
    ),
    "more CPUs a worker than there are": (
        {"compute.cpus_per_worker": 4096},
        ["compute.workers=1", "4096 CPUs", "cpus_per_worker"],
    ),
    "a GPU where there is none": ({"compute.gpus_per_worker": 64}, ["64 GPUs", "gpus_per_worker"]),
    "more workers than shards": ({"compute.workers": 9}, ["compute.workers=9", "4 logical shards", "num_shards"]),
    "name with a slash": ({"name": "a/b"}, ["name='a/b'", "use letters, digits"]),
    "name of two dots": ({"name": ".."}, ["name='..'", "use letters, digits"]),
    "name longer than a folder's": ({"name": "x" * 200}, ["name='xxx", "at most 100"]),
    "storage of no known kind": ({"storage": "ftp://host/runs"}, ["storage: ftp://host/runs", "another with storage="]),
    "storage with a password": ({"storage": "s3://k:secret@bucket/runs"}, ["storage: s3://…@bucket", "AWS_ACCESS_KEY_ID"]),
    "storage path too long": ({"storage": "x" * 300}, ["storage", "xxx", "File name too long"]),
    "tracking in a plain folder": ({"tracking.uri": "./mlruns"}, ["tracking.uri = './mlruns'", "sqlite:////"]),
    "tracking of another scheme": ({"tracking.uri": "ftp://host/x"}, ["tracking.uri = 'ftp://host/x'", "sqlite:////"]),
    "scheduler of another name": ({"scheduler.kind": "hyperband"}, ["scheduler.kind", "'hyperband'", "'asha'"]),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_bad_value_is_refused_before_anything_starts(case, desk):
    changes, words = VALUES[case]
    said = desk.refused("sweep", desk.write(changed(desk.config(), changes)))
    for word in words:
        assert word in said, said


def test_an_error_shows_brackets_as_they_are(desk):
    """Rich would read [lo, hi, n] as a style, and [/tmp] as the end of one."""
    values = changed(desk.config(), {"thresholds.grid.minority": {"linspace": "[/bold]"}})
    said = desk.refused("sweep", desk.write(values))
    assert "thresholds.grid.minority.linspace='[/bold]'" in said and "give [lo, hi, number of values]" in said


OVERRIDES = {
    "without a sign": (["primal.steps"], ["override 'primal.steps'", "key.path=value"]),
    "without a key": (["=5"], ["override '=5'", "key.path=value"]),
    "below a plain value": (["name.first=5"], ["override 'name.first=5'", "name is 'small'", "no fields inside"]),
    "that is not YAML": (["primal.steps=[1"], ["override 'primal.steps=[1'", "not readable as YAML"]),
    "of an unknown key": (["primal.step=5"], ["primal.step: unknown key", "did you mean 'steps'?"]),
    "of a bad value": (
        ["thresholds.grid.minority=[1.4]"],
        ["thresholds.grid.minority[0]=1.4", "a share must be in (0, 1)"],
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_bad_override_is_refused(case, desk):
    overrides, words = OVERRIDES[case]
    said = desk.refused("sweep", desk.write(desk.config()), *overrides)
    for word in words:
        assert word in said, said


FILES = {
    "that does not parse": ("name: [1\nseed: }", ["sweep.yaml", "not readable as YAML"]),
    "that is a list": ("- 1\n- 2\n", ["sweep.yaml", "expected a mapping", "list"]),
    "that is empty": ("", ["sweep.yaml", "expected a mapping"]),
    "with a Python object in it": ("name: !!python/object/apply:os.getcwd []", ["sweep.yaml", "not readable as YAML"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_sweep_file_is_refused(case, desk):
    text, words = FILES[case]
    said = desk.refused("sweep", desk.write(text))
    for word in words:
        assert word in said, said


def test_a_missing_sweep_file_is_named(desk):
    said = desk.refused("sweep", "nowhere.yaml")
    assert "nowhere.yaml: no such file" in said and "give the path" in said


def test_a_sweep_file_in_another_encoding_is_refused(desk):
    path = desk.work / "latin.yaml"
    path.write_bytes("name: gr\xfcn\n".encode("latin-1"))
    assert "latin.yaml: not readable as YAML" in desk.refused("sweep", path)


def test_several_mistakes_are_one_error_that_names_each(desk):
    said = desk.refused("sweep", desk.write(changed(desk.config(), {"sed": 1, "primal.lr": -1.0})))
    assert "sed: unknown key" in said and "primal.lr" in said


# -- data files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken, words",
    [
        ({"images": "picture"}, ["data.image_column='image'", "'picture'", "Name one of them"]),
        ({"labels": "digit"}, ["data.label_column='label'", "'digit'", "Name one of them"]),
        ({"first": b"not a picture"}, ["images.parquet", "row 0", "on_bad_image"]),
        ({"size": 9}, ["model.channels=[16, 32]", "9x9", "data.size"]),
    ],
    ids=["no image column", "no label column", "unreadable first image", "odd image size"],
)
def test_a_parquet_file_that_cannot_be_used_is_refused(broken, words, desk):
    path = write_parquet(desk.work / "images.parquet", **broken)
    said = desk.refused("sweep", desk.write(parquet_sweep(desk, path)))
    for word in words:
        assert word in said, said


def test_a_file_that_is_no_parquet_is_refused(desk):
    path = desk.work / "images.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    said = desk.refused("sweep", desk.write(parquet_sweep(desk, str(path))))
    assert "data.path=" in said and "images.parquet" in said and "cannot be read as Parquet" in said


def test_an_unreadable_picture_of_a_folder_is_named(desk):
    for label in ("cat", "dog"):
        (desk.work / "images" / label).mkdir(parents=True)
        for number, encoded in enumerate(pictures(20)):
            (desk.work / "images" / label / f"{number:02d}.png").write_bytes(encoded)
    (desk.work / "images" / "cat" / "00.png").write_bytes(b"\x89PNG but cut")
    data = {"dataset": "folder", "path": str(desk.work / "images"), "minority": {"classes": ["dog"], "keep": 0.5}}
    said = desk.refused("sweep", desk.write({**desk.config(), "data": data}))
    assert str(Path("cat") / "00.png") in said and "on_bad_image" in said


def test_a_parquet_file_with_everything_in_place_is_accepted(desk):
    path = write_parquet(desk.work / "images.parquet")
    plan = preflight(load_config(desk.write(parquet_sweep(desk, path))))
    assert plan.constraint_names == ("class_1",)


# -- storage, tracking, models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "deep/down"], ids=["a file", "a path below a file"])
def test_storage_that_cannot_be_a_folder_is_refused(below, desk):
    """The tests may run as root, who may write everywhere; a file in the way stops root too."""
    (desk.work / "taken").write_text("mine", encoding="utf-8")
    said = desk.refused("sweep", desk.write({**desk.config(), "storage": str(desk.work / "taken" / below)}))
    assert "storage" in said and str(desk.work / "taken") in said and "give another folder" in said


def test_storage_from_the_environment_is_checked_too(desk, monkeypatch):
    monkeypatch.setenv("DUALSWEEP_STORAGE", "ftp://bucket")
    path = desk.write(desk.config())
    for command in (["sweep", path], ["status"], ["status", "x"], ["resume", "x"], ["report", "x"], ["sync", "x"]):
        said = desk.refused(*command)
        assert "ftp://bucket" in said and "Unrecognized filesystem type" in said


@pytest.mark.parametrize("through", ["file", "environment"])
def test_a_tracking_server_that_does_not_answer_is_refused_within_ten_seconds(through, desk, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts; nobody ever replies
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        values = desk.config()
        if through == "file":
            values["tracking"] = {"uri": uri}
        else:
            monkeypatch.setenv("DUALSWEEP_TRACKING_URI", uri)
        path = desk.write(values)
        began = time.monotonic()
        said = desk.refused("sweep", path)
        took = time.monotonic() - began
    assert f"tracking.uri = '{uri}'" in said and "no answer" in said and "start it" in said
    assert took < 10


def test_a_tracking_server_that_refuses_is_named_at_once(desk):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # held but not listening: it refuses, and nobody else can take the port
        uri = f"http://127.0.0.1:{bound.getsockname()[1]}"
        said = desk.refused("sweep", desk.write(changed(desk.config(), {"tracking.uri": uri})))
    assert f"tracking.uri = '{uri}'" in said and "start it" in said


def test_a_tracking_database_that_is_another_file_is_refused(desk):
    (desk.work / "notes.db").write_text("no database at all", encoding="utf-8")
    uri = f"sqlite:///{desk.work / 'notes.db'}"
    said = desk.refused("sweep", desk.write(changed(desk.config(), {"tracking.uri": uri})))
    assert "tracking.uri" in said and "notes.db" in said and "choose another file name" in said


def test_a_pretrained_folder_without_a_model_is_refused(desk):
    (desk.work / "empty").mkdir()
    said = desk.refused("sweep", desk.write(changed(desk.config(), {"model.pretrained": "empty"})))
    assert f"model.pretrained='{desk.work / 'empty'}'" in said and "give a diffusers model folder" in said


def test_a_pretrained_folder_with_a_damaged_model_is_refused(desk):
    (desk.work / "damaged").mkdir()
    (desk.work / "damaged" / "model_index.json").write_text("{}", encoding="utf-8")
    said = desk.refused("sweep", desk.write(changed(desk.config(), {"model.pretrained": "damaged"})))
    assert "model.pretrained" in said and str(desk.work / "damaged") in said


def test_a_pretrained_model_of_other_images_is_refused_and_one_that_fits_is_not(desk):
    for channels in (1, 3):
        network = UNet2DModel(
            sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=8,
            block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
        network.save_pretrained(desk.work / f"channels-{channels}")
    said = desk.refused("sweep", desk.write(changed(desk.config(), {"model.pretrained": "channels-3"})))
    assert "model.pretrained=" in said and "channels-3" in said and "3 channels, the data have 1" in said
    with pytest.raises(RayStarted):
        desk.call("sweep", desk.write(changed(desk.config(), {"model.pretrained": "channels-1"})))


def test_another_noising_process_than_the_pretrained_models_own_is_refused(desk):
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    own = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    DDPMPipeline(unet=network, scheduler=DDPMScheduler(**own)).save_pretrained(desk.work / "pipeline")
    said = desk.refused("sweep", desk.write(changed(desk.config(), {"model.pretrained": "pipeline"})))
    remedy = "schedule: {kind: scaled_linear, num_train_timesteps: 1000, beta_start: 0.00085, beta_end: 0.012}"
    assert "schedule.kind='linear'" in said and "was trained with 'scaled_linear'" in said and remedy in said, said
    named = {"schedule": yaml.safe_load(remedy)["schedule"], "model.pretrained": "pipeline"}
    last = {**named, "schedule": {**named["schedule"], "beta_end": 0.02}}
    assert "schedule.beta_end=0.02" in desk.refused("sweep", desk.write(changed(desk.config(), last)))
    with pytest.raises(RayStarted):
        desk.call("sweep", desk.write(changed(desk.config(), named)))


def autoencoder(folder: Path, *, channels: int = 1, levels: int = 2) -> None:
    """Untrained, of 2 latent channels, a latent for 2^(levels - 1) pixels a side."""
    AutoencoderKL(
        in_channels=channels, out_channels=channels, block_out_channels=(4,) * levels, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2,
    ).save_pretrained(folder)  # fmt: skip


AUTOENCODERS = {
    "not there": ({"model.autoencoder": "nowhere"}, ["model.autoencoder='nowhere'", "give a local folder"]),
    "another network": ({"model.autoencoder": "unet"}, ["/unet'", "it holds a UNet2DModel", "give a local folder"]),
    "weights cut short": ({"model.autoencoder": "cut"}, ["model.autoencoder=", "/cut' cannot be loaded"]),
    "colour for grey": ({"model.autoencoder": "color"}, ["model.autoencoder=", "3 channels, the data have 1"]),
    "five levels": ({"model.autoencoder": "deep"}, ["model.autoencoder=", "16x16 pixels", "8x8", "data.size"]),
    "vectors": (
        {"data": {"dataset": "gaussian_mixture"}, "model": {"kind": "mlp", "autoencoder": "vae"}},
        ["model.autoencoder is for images", "remove it"],
    ),
    "latents that do not halve": (
        {"model.autoencoder": "vae", "model.channels": [8, 8, 8, 8]},
        ["model.channels=[8, 8, 8, 8] halves latents 3 times", "4x4"],
    ),
    "a network of images": (
        {"model.autoencoder": "vae", "model.pretrained": "unet"},
        ["/unet': made for latents of 1 channels", "model.autoencoder have 2"],
    ),
}


@pytest.mark.parametrize("case", AUTOENCODERS)
def test_an_autoencoder_that_does_not_fit_is_refused_and_one_that_does_is_not(case, desk):
    autoencoder(desk.work / "vae")
    autoencoder(desk.work / "cut")
    weights = desk.work / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    autoencoder(desk.work / "color", channels=3)
    autoencoder(desk.work / "deep", levels=5)
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(desk.work / "unet")  # fmt: skip
    changes, words = AUTOENCODERS[case]
    said = desk.refused("sweep", desk.write(changed(desk.config(), changes)))
    for word in words:
        assert word in said, said
    with pytest.raises(RayStarted):
        desk.call("sweep", desk.write(changed(desk.config(), {"model.autoencoder": "vae"})))


def test_a_pretrained_path_that_is_not_there_is_refused(desk):
    said = desk.refused("sweep", desk.write(changed(desk.config(), {"model.pretrained": "/nowhere/model"})))
    assert "model.pretrained='/nowhere/model'" in said and "give a diffusers model folder" in said


# -- sweeps that exist, or do not -------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_refused(desk):
    desk.finished_config("small")
    said = desk.refused("sweep", desk.write(desk.config()))
    assert "name: sweep 'small' already exists" in said and "dualsweep resume small" in said and "--fresh-name" in said


@pytest.mark.parametrize("command", ["resume", "status", "report", "sync"])
def test_an_unknown_sweep_is_named_by_every_command(command, desk):
    desk.finished_config("known")
    said = desk.refused(command, "unknown", "--storage", desk.storage)
    assert "name: no sweep 'unknown'" in said and "dualsweep status" in said


@pytest.mark.parametrize("command", ["resume", "status", "report", "sync"])
@pytest.mark.parametrize(
    "damage, words",
    [
        ("name: [", ["not readable as YAML"]),
        ("- 1", ["expected a mapping"]),
        ("name: done\nsed: 1", ["sed: unknown key", "did you mean"]),
    ],
    ids=["no YAML", "a list", "other fields"],
)
def test_a_damaged_stored_config_is_refused(command, damage, words, desk):
    desk.finished_config()
    (desk.storage / "done" / "sweep.yaml").write_text(damage, encoding="utf-8")
    said = desk.refused(command, "done", "--storage", desk.storage)
    for word in [str(desk.storage / "done" / "sweep.yaml"), *words]:
        assert word in said, said


@pytest.mark.parametrize("command", ["status", "resume"])
def test_a_journal_damaged_in_the_middle_is_refused_with_file_and_place(command, desk):
    desk.finished_config()
    path = desk.storage / "done" / "journal.jsonl"
    content = bytearray(path.read_bytes())
    second = content.index(b"\n") + 1
    content[second + 20] ^= 1
    path.write_bytes(content)
    said = desk.refused(command, "done", "--storage", desk.storage)
    assert str(path) in said and f"byte {second}" in said and "restore the file" in said


def test_damaged_points_are_refused_by_status(desk):
    desk.finished_config()
    (desk.storage / "done" / "points.json").write_text("[{", encoding="utf-8")
    assert "sweep 'done'" in desk.refused("status", "done", "--storage", desk.storage)


def test_a_corrupted_checkpoint_is_left_to_the_trial_it_belongs_to(desk):
    """It fails by name (see test_loop), or is over already, and the others are resumed."""
    desk.finished_config()
    checkpoint = desk.storage / "done" / "trials" / "share-1" / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "tensors.safetensors").write_bytes(b"cut short")
    (checkpoint / "state.json").write_text(
        json.dumps({"version": 1, "sha256": "0" * 64, "fingerprint": "x"}), encoding="utf-8"
    )
    with pytest.raises(RayStarted):
        desk.call("resume", "done", "--storage", desk.storage)


@pytest.mark.parametrize("command", ["resume", "sync"])
def test_a_file_system_without_locks_is_not_taken_for_another_driver(command, desk, monkeypatch):
    desk.finished_config()

    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = desk.refused(command, "done", "--storage", desk.storage)
    assert "driver.lock cannot be locked (No locks available)" in said and "storage" in said
    assert not is_running(desk.storage / "done")


def test_an_interrupted_sweep_in_order_gets_as_far_as_ray(desk):
    desk.finished_config()
    before = desk.everything()
    with pytest.raises(RayStarted):
        desk.call("resume", "done", "--storage", desk.storage)
    assert desk.everything() == before


def test_a_report_without_results_says_so(desk):
    desk.finished_config()
    said = desk.refused("report", "done", "--storage", desk.storage)
    assert "name: sweep 'done' has no finished trial yet" in said and "dualsweep status done" in said


def test_a_folder_that_is_no_model_gives_no_samples(desk):
    (desk.work / "nothing").mkdir()
    said = desk.refused("sample", str(desk.work / "nothing"))
    assert str(desk.work / "nothing") in said


# -- one point, addresses, usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at, words",
    [
        (["minority"], ["--at 'minority'", "axis=number"]),
        (["minority=much"], ["--at 'minority=much'", "axis=number"]),
        (["minority=1.4"], ["thresholds.list[0].minority=1.4", "a share must be in (0, 1)"]),
        (["others=0.1"], ["thresholds.list[0].others", "unknown axis"]),
    ],
)
def test_a_bad_point_to_train_at_is_refused(at, words, desk):
    said = desk.refused("train", desk.write(desk.config()), *[part for text in at for part in ("--at", text)])
    for word in words:
        assert word in said, said


def test_training_one_point_of_a_search_needs_the_point(desk):
    values = changed(desk.config(), {"thresholds": {"search": {"axes": {"minority": {"uniform": [0.1, 0.2]}}}}})
    said = desk.refused("train", desk.write(values))
    assert "thresholds.search has no first point" in said and "--at axis=value" in said


@pytest.mark.parametrize(
    "argv, word",
    [
        (["sweep"], "FILE"),
        (["resume"], "NAME"),
        (["swep", "x.yaml"], "swep"),
        (["sweep", "x.yaml", "--fast"], "--fast"),
        (["sample", "model", "--count", "0"], "--count"),
    ],
)
def test_a_wrong_command_line_exits_with_two_and_names_the_word(argv, word, desk):
    before = desk.everything()
    code, said = desk.call(*argv)
    assert code == 2 and word in said and "Traceback" not in said
    assert desk.everything() == before and not ray.is_initialized()


def test_an_address_to_be_found_where_there_is_none_is_refused(desk):
    said = desk.refused("sweep", desk.write(desk.config()), "--address", "auto")
    assert "address: 'auto' finds no Ray" in said and "--address local" in said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("given", ["environment", "option"])
def test_a_cluster_that_is_not_there_is_named_within_a_minute(given, desk):
    """In a process of its own: Ray's core may take the whole process with it."""
    with socket.create_server(("127.0.0.1", 0)) as once:
        address = f"127.0.0.1:{once.getsockname()[1]}"
    argv = [sys.executable, "-m", "dualsweep", "sweep", desk.write(desk.config())]
    environment = {**os.environ, "RAY_ADDRESS": address} if given == "environment" else dict(os.environ)
    before = desk.everything()
    began = time.monotonic()
    ended = subprocess.run(
        argv + (["--address", address] if given == "option" else []),
        cwd=desk.work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    took = time.monotonic() - began
    assert ended.returncode == 2, ended.stderr
    assert (
        f"no Ray cluster answers at '{address}'" in ended.stderr
        and "start one with `ray up cluster.yaml`" in ended.stderr
    )
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert desk.everything() == before
    assert took < 60  # most of it is importing on shared cores; ray.init by itself tries for minutes


# -- the good side ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_passes_all_checks_and_nothing_is_written(path, desk):
    before = desk.everything()
    plan = preflight(load_config(path, [f"storage={desk.storage}"]))
    assert plan.folder == desk.storage / plan.config.name and plan.constraint_names
    assert len({point["trial_id"] for point in plan.points}) == len(plan.points)
    assert desk.everything() == before


def test_the_main_job_holds_the_runs_the_issue_asks_for(desk):
    plan = preflight(load_config(EXAMPLES / "digits_fairness.yaml", [f"storage={desk.storage}"]))
    kinds = [point["kind"] for point in plan.points]
    assert (kinds.count("constrained") >= 4, kinds.count("unconstrained"), kinds.count("fixed_weights")) == (True, 1, 2)


def test_a_good_sweep_gets_as_far_as_ray_with_nothing_written(desk):
    path = desk.write(desk.config())
    before = desk.everything()
    with pytest.raises(RayStarted):
        desk.call("sweep", path)
    assert desk.everything() == before


def test_a_taken_name_passes_with_a_fresh_one(desk):
    desk.finished_config("small")
    path = desk.write(desk.config())
    with pytest.raises(RayStarted):
        desk.call("sweep", path, "--fresh-name")
