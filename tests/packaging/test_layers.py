"""Import direction: constraints and datasets stand alone, trainers uses both, orchestration all three, dualsweep all.

Every import is read from the source with ``ast``, also those inside functions and ``importlib.import_module("...")``.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("constraints", "datasets", "trainers", "orchestration", "dualsweep")
MAY_IMPORT = {
    "constraints": {"constraints"},
    "datasets": {"datasets"},
    "trainers": {"trainers", "constraints", "datasets"},
    "orchestration": {"orchestration", "trainers", "constraints", "datasets"},
    "dualsweep": set(FOLDERS),
}
# Third-party packages a folder is held to; a folder that is not named here may use any but those below.
ONLY_THIRD_PARTY = {
    "constraints": {"numpy"},
    "datasets": {"numpy", "scipy", "PIL", "pyarrow", "sklearn", "torch"},
}
# Package -> where it may be imported: a folder, or one file.
CONFINED = {
    "ray": ("orchestration/", "trainers/worker.py"),
    "mlflow": ("orchestration/tracking", "orchestration/pyfunc_model.py"),  # tracking.py and tracking_uri.py
}


def imported_modules(tree: ast.Module, module: str, is_package: bool) -> list[tuple[str, int]]:
    """Full dotted names that a module imports, with lines; ``from a import b`` gives ``a.b``, as b may be a module."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.args[0].value, node.lineno))
    return found


def complaint(path: str, name: str) -> str | None:
    """Why the file at ``path`` (relative to the repository) must not import ``name``; None when it may."""
    folder = path.split("/")[0]
    top, *below = name.split(".")
    if top in FOLDERS[:-1]:
        return f"the bare name {top!r}; inside the project it is dualsweep.{top}"
    if top == "dualsweep":
        target = below[0] if below and below[0] in FOLDERS else "dualsweep"
        return None if target in MAY_IMPORT[folder] else f"{folder} must not import {target}"
    if top in sys.stdlib_module_names:
        return None
    if folder in ONLY_THIRD_PARTY and top not in ONLY_THIRD_PARTY[folder]:
        return f"{folder} is held to the standard library and {sorted(ONLY_THIRD_PARTY[folder])}"
    if top in CONFINED and not path.startswith(CONFINED[top]):
        return f"{top} belongs in {CONFINED[top]} only"
    return None


def complaints(root: Path) -> list[str]:
    """One line for every forbidden import below ``root``: file, line, name and reason."""
    lines = []
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            dotted = path.removesuffix(".py").replace("/", ".")
            module = (dotted if folder == "dualsweep" else f"dualsweep.{dotted}").removesuffix(".__init__")
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for name, line in imported_modules(tree, module, is_package=file.name == "__init__.py"):
                reason = complaint(path, name)
                if reason:
                    lines.append(f"{path}:{line}: imports {name}: {reason}")
    return lines


def test_no_import_points_against_the_layers():
    assert complaints(ROOT) == []


def test_the_walk_reads_every_folder():
    """A walk that finds no files would pass whatever they import."""
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").is_file(), folder


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("constraints/x.py", "import torch", "held to the standard library"),
        ("constraints/x.py", "from dualsweep.datasets import spec", "constraints must not import datasets"),
        ("constraints/x.py", "from dualsweep import datasets", "constraints must not import datasets"),
        ("constraints/x.py", "from ..trainers import state", "constraints must not import trainers"),
        ("constraints/x.py", "from dualsweep import __version__", "constraints must not import dualsweep"),
        ("datasets/x.py", "import ray", "held to the standard library"),
        ("datasets/x.py", "from dualsweep.constraints.problem import Problem", "datasets must not import constraints"),
        ("trainers/x.py", "def f():\n    import dualsweep.orchestration", "trainers must not import orchestration"),
        ("trainers/methods/x.py", "from ...orchestration import trace", "trainers must not import orchestration"),
        ("trainers/x.py", "from ray import train", "ray belongs in"),
        ("trainers/x.py", "import mlflow.pyfunc", "mlflow belongs in"),
        ("orchestration/x.py", "import mlflow", "mlflow belongs in"),
        ("orchestration/x.py", "from dualsweep.cli import main", "orchestration must not import dualsweep"),
        ("orchestration/x.py", "import_module('dualsweep.cli')", "must not import dualsweep"),
        ("dualsweep/x.py", "import ray", "ray belongs in"),
        ("dualsweep/x.py", "from datasets import load_dataset", "the bare name 'datasets'"),
    ],
)
def test_an_arrow_that_points_back_is_found(tmp_path, path, source, reason):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    (line,) = complaints(tmp_path)
    assert line.startswith(f"{path}:") and reason in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("constraints/x.py", "import math, numpy\nfrom dualsweep.constraints import problem\nfrom . import domains"),
        ("datasets/x.py", "import pyarrow.parquet\nfrom PIL import Image\nfrom dualsweep.datasets.spec import build"),
        ("trainers/worker.py", "import ray.train\nfrom dualsweep.constraints import problem"),
        ("trainers/methods/x.py", "from ...datasets import streams\nfrom .. import state"),
        ("orchestration/tracking.py", "import mlflow\nimport ray"),
        ("dualsweep/x.py", "from dualsweep.orchestration import config\nimport typer"),
    ],
)
def test_an_allowed_import_is_left_alone(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    assert complaints(tmp_path) == []


def imported_with(module: str) -> set[str]:
    source = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split())


def test_a_driver_starts_without_what_only_workers_need():
    """Each takes seconds to import, before a bad field is named or Ray is started."""
    loaded = imported_with("dualsweep.orchestration.sweep")
    assert "torch" in loaded
    later = {"ray.tune", "ray.train", "optuna", "mlflow", "matplotlib"}  # once all is checked
    assert not {"diffusers", "accelerate", "sklearn", "scipy.optimize", *later} & loaded


def test_a_worker_starts_without_what_diffusers_takes_along():
    """The packages stay importable for everybody else, and a model can be built, written and read."""
    source = """
import sys, tempfile
from dualsweep.trainers.lean_imports import import_diffusers
import_diffusers()
import dualsweep.trainers.worker
loaded = set(sys.modules)
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
network = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, **blocks)
folder = tempfile.mkdtemp()
DDPMPipeline(unet=network, scheduler=DDPMScheduler()).save_pretrained(folder)
DDPMPipeline.from_pretrained(folder)
import peft, transformers
print(*loaded)
"""
    loaded = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split()
    assert "diffusers.training_utils" in loaded
    assert not {"peft", "transformers", "sklearn", "scipy.optimize", "scipy.stats"} & set(loaded)


def test_tunes_actors_start_without_torch():
    """There is one a slot, which starts before the slot's worker does, on the same processors."""
    loaded = imported_with("dualsweep.orchestration.trial")
    assert "ray.train" in loaded and "torch" not in loaded
