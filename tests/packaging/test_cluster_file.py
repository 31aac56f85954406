"""cluster.yaml is what ``ray up`` takes, and deploy/kuberay.yaml asks Kubernetes for the same cluster."""

import copy
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from dualsweep.orchestration.storage import storage_root

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("DUALSWEEP_STORAGE", "DUALSWEEP_AUTOSCALED", "DUALSWEEP_TRACKING_URI", "MLFLOW_TRACKING_URI")


def read_yaml(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def base_image() -> str:
    """The image deploy/Dockerfile starts from."""
    return re.search(r"^FROM (\S+)$", (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8"), re.MULTILINE).group(1)


@pytest.fixture
def cluster() -> dict:
    return read_yaml("cluster.yaml")


@pytest.fixture
def ray_cluster() -> dict:
    return read_yaml("deploy/kuberay.yaml")


def only_container(group: dict) -> dict:
    (container,) = group["template"]["spec"]["containers"]
    return container


# ---- cluster.yaml, for `ray up`


def test_ray_accepts_the_cluster_file(cluster):
    validate_config(prepare_config(cluster))


def test_ray_refuses_a_misspelt_key(cluster):
    cluster["idle_timeout_minute"] = cluster.pop("idle_timeout_minutes")
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config(cluster))


def test_ray_refuses_more_workers_at_least_than_at_most(cluster):
    cluster["available_node_types"]["gpu_worker"]["min_workers"] = cluster["max_workers"] + 1
    with pytest.raises(ValueError):
        validate_config(prepare_config(cluster))


def test_no_trial_lands_on_the_head(cluster):
    head = prepare_config(cluster)["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


def test_gpu_workers_come_and_go(cluster):
    worker = cluster["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert 0 < worker["max_workers"] <= cluster["max_workers"]
    # Stated counts would override what Ray reads from the instance type, and go wrong when somebody changes the type.
    assert worker["resources"] == {}


def test_every_node_installs_the_wheel_that_the_cluster_file_ships(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    (remote,) = [remote for remote, local in cluster["file_mounts"].items() if local == "./dist"]
    for commands in (prepared["head_setup_commands"], prepared["worker_setup_commands"]):
        assert any(f"{remote}/dualsweep-*.whl" in command and "pip install" in command for command in commands)


def test_storage_and_tracking_come_from_the_environment_of_every_node(cluster):
    options = cluster["docker"]["run_options"]
    for name in SETTINGS:
        assert any(option.startswith(f"--env={name}=") for option in options), name


def test_storage_is_a_folder_that_is_mounted_on_every_node(cluster):
    """A bucket's address is refused by ``dualsweep``: workers write through the file system."""
    options = cluster["docker"]["run_options"]
    (storage,) = [option.split("=", 2)[2] for option in options if option.startswith("--env=DUALSWEEP_STORAGE=")]
    assert storage_root(storage) == Path("/mnt/shared/dualsweep")
    assert "--volume=/mnt/shared:/mnt/shared" in options
    assert any("mount -t nfs4" in command for command in cluster["initialization_commands"])


def test_no_comment_slipped_into_a_command(cluster):
    """In a folded string ``# EDIT`` is no YAML comment; Ray wraps commands in ``( )``, whose end it would swallow."""
    commands = [command for key, value in cluster.items() if key.endswith("_commands") for command in value]
    assert [command for command in commands if " #" in command] == []


def test_the_token_is_asked_for_and_reaches_every_node(cluster):
    assert "--env=RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_dashboard_can_be_looked_at(cluster):
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=0.0.0.0" in start
    assert "--include-dashboard" not in start


def test_the_container_is_the_one_the_image_is_built_from(cluster):
    assert cluster["docker"]["image"] == base_image()
    assert "head_image" not in cluster["docker"] and "worker_image" not in cluster["docker"]


def test_the_containers_ray_is_within_the_package_bounds():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (ray,) = [line for line in dependencies if line.startswith("ray[")]
    assert Requirement(ray).specifier.contains(re.search(r"ray:([\d.]+)-", base_image()).group(1))


# ---- deploy/kuberay.yaml, for the KubeRay operator


def test_the_manifest_is_a_ray_cluster_of_the_images_ray_version(ray_cluster):
    assert (ray_cluster["apiVersion"], ray_cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert base_image().startswith(f"rayproject/ray:{ray_cluster['spec']['rayVersion']}-")


def test_head_and_workers_run_the_image_of_this_version(ray_cluster):
    spec = ray_cluster["spec"]
    images = {only_container(group)["image"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])}
    assert len(images) == 1
    assert images.pop().endswith(f"dualsweep:{version()}")


def test_the_manifests_head_offers_no_cpu(ray_cluster):
    # KubeRay hands these to `ray start` as they are, and the operator's schema wants strings.
    assert ray_cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_manifests_gpu_workers_come_and_go(ray_cluster):
    assert ray_cluster["spec"]["enableInTreeAutoscaling"] is True
    (group,) = ray_cluster["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] == 0 <= group["replicas"] <= group["maxReplicas"]
    resources = only_container(group)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == 1
    assert resources["requests"] == resources["limits"]


def test_the_manifest_gives_every_pod_storage_tracking_and_the_token(ray_cluster):
    spec = ray_cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        environment = {entry["name"]: entry["value"] for entry in only_container(group)["env"]}
        assert set(SETTINGS) <= set(environment)
        # Kubernetes refuses a number or a boolean here.
        assert all(isinstance(value, str) for value in environment.values())


def test_both_files_ask_for_as_many_workers_and_the_same_environment(cluster, ray_cluster):
    (group,) = ray_cluster["spec"]["workerGroupSpecs"]
    assert group["maxReplicas"] == cluster["available_node_types"]["gpu_worker"]["max_workers"]
    on_aws = {option.split("=")[1] for option in cluster["docker"]["run_options"] if option.startswith("--env=")}
    on_aws.remove("RAY_AUTH_MODE")  # on Kubernetes the operator sets it, from authOptions
    assert on_aws == {entry["name"] for entry in only_container(group)["env"]}


def test_the_manifests_storage_is_a_folder_that_every_pod_mounts(ray_cluster):
    spec = ray_cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        container = only_container(group)
        (storage,) = [entry["value"] for entry in container["env"] if entry["name"] == "DUALSWEEP_STORAGE"]
        (volume,) = [mount["name"] for mount in container["volumeMounts"] if storage.startswith(mount["mountPath"])]
        (claim,) = [entry for entry in group["template"]["spec"]["volumes"] if entry["name"] == volume]
        assert claim["persistentVolumeClaim"]["claimName"]


# ---- deploy/Dockerfile


def test_the_image_copies_every_folder_that_the_package_is_made_of():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    needed = {folder.split("/")[0] for folder in settings["package-dir"].values()}
    lines = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    assert needed | {"pyproject.toml", "README.md", "LICENSE"} <= copied
