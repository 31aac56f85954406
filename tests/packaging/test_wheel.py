"""A wheel, a plain install and an editable install all give ``dualsweep.*`` and never a top-level ``datasets``.

Each install goes into a virtual environment of its own, made from a copy of the sources, so that neither the checkout
nor the environment that runs pytest is touched. The heavy dependencies come from the latter, through one .pth file.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUBPACKAGES = ("constraints", "datasets", "trainers", "orchestration")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dualsweep", *SUBPACKAGES)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# Nothing is downloaded: setuptools is in the test extra, and the dependencies are installed already.
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command. No PYTHON* variable of the caller's reaches it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    finished = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what the package is made of: builds leave build/ and *.egg-info behind."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, sources, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_everything_in_the_wheel_lies_below_dualsweep(wheel):
    top_level = {name.split("/")[0] for name in files_in(wheel)}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert top_level == {"dualsweep", f"dualsweep-{version}.dist-info"}


def test_the_wheel_holds_every_module_and_the_reports_template(wheel):
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dualsweep").rglob("*.py")}
    for folder in SUBPACKAGES:
        expected |= {f"dualsweep/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    expected.add("dualsweep/orchestration/report.html.j2")
    assert expected <= files_in(wheel)


def test_the_wheel_carries_licence_bounds_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = HeaderParser().parsestr(archive.read(f"{folder}/METADATA").decode())
        assert archive.read(f"{folder}/licenses/LICENSE").decode().lstrip().startswith("Apache License")
        assert "dualsweep = dualsweep.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert metadata["License-Expression"] == "Apache-2.0"
    always = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line for line in always if not any(sign in line for sign in "<>=")] == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["wheel", "plain", "editable"])
def test_each_form_of_install_gives_the_packages_and_hides_nothing(form, wheel, sources, tmp_path):
    outer = Path(sysconfig.get_path("purelib"))
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin/python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    for tool in (*outer.glob("setuptools*"), outer / "_distutils_hack"):
        (site_packages / tool.name).symlink_to(tool)
    what = {"wheel": [wheel], "plain": [sources], "editable": ["--editable", sources]}[form]
    run(*PIP, "--python", python, "install", *OFFLINE, *what, cwd=tmp_path)
    # Only now: pip must not see, and then replace, the dualsweep of the environment that runs pytest.
    (site_packages / "outer.pth").write_text(f"{outer}\n", encoding="utf-8")

    script = f"""
import importlib, importlib.resources, importlib.util, json
folders = {SUBPACKAGES}
found = {{name: importlib.import_module(f"dualsweep.{{name}}").__file__ for name in folders}}
found["bare"] = [name for name in folders if name != "datasets" and importlib.util.find_spec(name)]
found["hugging_face"] = importlib.util.find_spec("datasets").origin
found["template"] = str(importlib.resources.files("dualsweep.orchestration") / "report.html.j2")
print(json.dumps(found))
"""
    for isolation in ("-I", "-P"):
        found = json.loads(run(python, isolation, "-c", script, cwd=tmp_path))
        for name in SUBPACKAGES:
            home = sources / name if form == "editable" else site_packages / "dualsweep" / name
            assert Path(found[name]) == home / "__init__.py"
        assert found["bare"] == []
        assert Path(found["hugging_face"]).is_relative_to(outer)
        assert Path(found["template"]).is_file()
    # From a checkout too: an installed script puts its own folder on the path, not the working directory.
    assert "sweep" in run(environment / "bin/dualsweep", "--help", cwd=sources)
