"""A sweep's file becomes a complete config: round trips, overrides, environment, absolute paths, schema, shared bases."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dualsweep import cli
from dualsweep.orchestration.config import ConfigError, SweepConfig, load_config, point_for_search, sweep_points
from dualsweep.orchestration.preflight import first_point, fresh_name, preflight
from dualsweep.trainers.methods import METHODS

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("digit_4", "digit_5")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("DUALSWEEP_STORAGE", "DUALSWEEP_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def values(**changes):
    return {
        "name": "small",
        "data": {"dataset": "digits", "minority": {"classes": [4, 5], "keep": 0.1}},
        "thresholds": {"unit": "share", "grid": {"minority": [0.05, 0.1]}},
        **changes,
    }


def written(path, config=None):
    path.write_text(yaml.safe_dump(config or values()), encoding="utf-8")
    return path


def positive(**limits):
    return st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False, **limits)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    data=st.data(),
    lr=positive(),
    step_size=positive(max_value=1e6),
    keep=st.integers(1, 1000) | positive(max_value=1.0),
    classes=st.lists(st.integers(0, 9) | st.sampled_from(["digit_1", "digit_2"]), min_size=1, max_size=4),
    means=st.none() | st.lists(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2), min_size=1, max_size=3),
    seed=st.integers(0, 2**31 - 1),
    tolerance=st.floats(0, 10),
    channels=st.lists(st.sampled_from([8, 16, 64]), min_size=1, max_size=3),
    concurrent=st.just("auto") | st.integers(1, 100),
    weights=st.lists(st.floats(0, 1e3), max_size=3, unique_by=lambda weight: f"{weight:g}"),
    shares=st.lists(st.floats(0.01, 0.4), min_size=1, max_size=4),
)
def test_a_config_survives_the_trip_through_json_and_yaml_to_the_bit(
    data, lr, step_size, keep, classes, means, seed, tolerance, channels, concurrent, weights, shares
):
    config = SweepConfig.from_dict(
        values(
            seed=seed,
            data={"dataset": "digits", "minority": {"classes": classes, "keep": keep}, "means": means},
            model={"channels": channels, "attention": data.draw(st.none() | st.just([True] * len(channels)))},
            primal={"lr": lr},
            dual={"rule": "ascent", "step_size": step_size},
            thresholds={"list": [{"minority": share} for share in shares]},
            baselines={"fixed_weights": weights},
            compute={"concurrent_trials": concurrent},
            evaluation={"tolerance": tolerance},
        )
    )
    plain = config.to_dict()
    for again in (
        json.loads(json.dumps(plain, allow_nan=False)),
        yaml.safe_load(yaml.safe_dump(plain, sort_keys=False)),
    ):
        back = SweepConfig.from_dict(again)
        assert back == config and back.to_dict() == plain
        assert type(back.data.minority.keep) is type(config.data.minority.keep)  # 1 is one image, 1.0 all of them
        assert back.base_key() == config.base_key()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_complete_after_a_round_trip(path):
    config = load_config(path)
    assert SweepConfig.from_dict(config.to_dict()) == config
    assert set(config.to_dict()) == set(SweepConfig.model_fields)


def test_overrides_reach_into_sections_and_are_read_as_yaml(tmp_path):
    config = load_config(
        written(tmp_path / "sweep.yaml"),
        [
            "primal.steps=300",
            "primal.lr=1e-3",
            "pretrain.lr=5E-4",
            "thresholds.grid.minority=[0.2, 1e-1]",
            "baselines.unconstrained=false",
            "tracking.experiment=a=b",
            "name=other",
        ],
    )
    assert (config.primal.steps, config.primal.lr, config.pretrain.lr) == (300, 1e-3, 5e-4)
    assert config.thresholds.grid == {"minority": [0.2, 0.1]}
    assert config.baselines.unconstrained is False
    assert (config.experiment, config.name) == ("a=b", "other")


def test_a_later_override_wins(tmp_path):
    assert load_config(written(tmp_path / "sweep.yaml"), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "+1e-3", "10e-4"])
def test_a_number_with_an_exponent_is_a_number_in_the_file_and_in_an_override(text, tmp_path):
    """YAML 1.1 reads most of these as text."""
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(values()) + f"primal: {{lr: {text}}}\nthresholds: {{grid: {{minority: [{text}]}}}}\n",
        encoding="utf-8",
    )
    config = load_config(path)
    assert config.primal.lr == 1e-3 and config.thresholds.grid == {"minority": [1e-3]}
    assert load_config(written(path), [f"primal.lr={text}"]).primal.lr == 1e-3


def test_environment_variables_replace_the_file_and_overrides_replace_them(tmp_path, monkeypatch):
    path = written(
        tmp_path / "sweep.yaml", values(storage="here", tracking={"uri": "http://file:1", "experiment": "e"})
    )
    monkeypatch.setenv("DUALSWEEP_STORAGE", str(tmp_path / "there"))
    monkeypatch.setenv("DUALSWEEP_TRACKING_URI", "http://environment:2")
    config = load_config(path)
    assert (config.storage, config.tracking.uri, config.experiment) == (
        str(tmp_path / "there"),
        "http://environment:2",
        "e",
    )
    config = load_config(path, ["storage=/over", "tracking.uri=http://override:3"])
    assert (config.storage, config.tracking.uri) == ("/over", "http://override:3")
    config = load_config(path, environment=False)
    assert Path(config.storage).name == "here" and config.tracking.uri == "http://file:1"
    monkeypatch.setenv("DUALSWEEP_STORAGE", "")
    assert Path(load_config(path).storage).name == "here"


def test_relative_paths_are_the_callers_and_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    data = {
        "dataset": "idx",
        "path": "a.idx",
        "labels_path": "b.idx",
        "test_path": "../c.idx",
        "test_labels_path": "/d.idx",
        "minority": {"classes": [1]},
    }
    config = load_config(
        written(tmp_path / "sweep.yaml", values(data=data, storage="runs", model={"pretrained": "model"}))
    )
    assert config.storage == str(tmp_path / "runs")
    assert config.model.pretrained == str(tmp_path / "model")
    found = (config.data.path, config.data.labels_path, config.data.test_path, config.data.test_labels_path)
    assert found == (str(tmp_path / "a.idx"), str(tmp_path / "b.idx"), str(tmp_path.parent / "c.idx"), "/d.idx")


def test_addresses_and_hub_names_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"dataset": "parquet", "path": "s3://bucket/*.parquet", "minority": {"classes": [1]}}
    config = load_config(
        written(
            tmp_path / "sweep.yaml",
            values(data=data, storage="file:///runs", model={"pretrained": "google/ddpm-cifar10-32"}),
        )
    )
    assert (config.data.path, config.storage, config.model.pretrained) == (
        "s3://bucket/*.parquet",
        "file:///runs",
        "google/ddpm-cifar10-32",
    )
    assert load_config(tmp_path / "sweep.yaml", ["storage=~/runs"]).storage == str(Path.home() / "runs")


def test_a_config_cannot_be_changed_after_it_was_checked():
    config = SweepConfig.from_dict(values())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 5


def test_the_printed_schema_accepts_the_examples_and_refuses_an_unknown_key(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dualsweep", "schema"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in sorted(EXAMPLES.glob("*.yaml")):
        example = yaml.safe_load(path.read_text(encoding="utf-8"))
        jsonschema.validate(example, schema)
        for wrong in (
            {**example, "sed": 1},
            {**example, "primal": {"stesp": 1}},
            {**example, "name": 5},
            {key: example[key] for key in example if key != "thresholds"},
        ):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, schema)


SHARED = ["primal.steps=300", "dual.step_size=0.5", "thresholds.grid.minority=[0.3]", "formulation.levels=8", "baselines.unconstrained=false", "compute.workers=2", "evaluation.num_samples=99", "tracking.experiment=e", "storage=elsewhere", "name=other", "measure.window=1", "scheduler.kind=asha", "checkpoint_every_dual_steps=3", "divergence.factor=100", "sweep.order=path", "stopping.window=9"]  # fmt: skip
ITS_OWN = ["seed=1", "data.minority.keep=0.2", "data.minority.classes=[4]", "data.seed=1", "data.held_out=0.3", "data.size=16", "model.channels=[8]", "model.attention=[true, false]", "schedule.kind=squaredcos_cap_v2", "schedule.num_train_timesteps=500", "pretrain.steps=300", "pretrain.lr=0.5", "pretrain.ema_decay=0.5", "pretrain.num_shards=2"]  # fmt: skip


@pytest.mark.parametrize("override", SHARED)
def test_sweeps_that_differ_only_after_the_pretraining_share_its_model(override, tmp_path):
    path = written(tmp_path / "sweep.yaml")
    assert load_config(path, [override]).base_key() == load_config(path).base_key()


@pytest.mark.parametrize("override", ITS_OWN)
def test_anything_the_pretraining_depends_on_gives_a_base_of_its_own(override, tmp_path):
    path = written(tmp_path / "sweep.yaml")
    assert load_config(path, [override]).base_key() != load_config(path).base_key()


def test_no_section_is_left_out_of_the_question_what_a_base_depends_on():
    decided = {text.partition("=")[0].partition(".")[0] for text in (*SHARED, *ITS_OWN)}
    assert decided | {"method"} == set(SweepConfig.model_fields)


def test_points_come_baselines_first_and_carry_what_a_trial_needs():
    points = sweep_points(SweepConfig.from_dict(values(baselines={"fixed_weights": [0.05, 0.3]})), NAMES)
    assert [point["kind"] for point in points] == [
        "unconstrained",
        "constrained",
        "constrained",
        "fixed_weights",
        "fixed_weights",
    ]
    assert [point["fixed_weight"] for point in points] == [None, None, None, 0.05, 0.3]
    assert points[1]["thresholds"] == {"digit_4": 0.05, "digit_5": 0.05} and points[1]["label"] == "minority >= 0.05"
    assert len({point["trial_id"] for point in points}) == 5
    for point in points:
        assert set(point) == {"trial_id", "label", "kind", "thresholds", "fixed_weight"}
        json.dumps(point)


def test_a_searched_point_has_the_id_of_the_same_point_in_a_grid():
    config = SweepConfig.from_dict(values())
    listed = sweep_points(config, NAMES)[2]
    searched = point_for_search(config, NAMES, {"minority": 0.1})
    assert searched == listed
    assert point_for_search(config, NAMES[::-1], {"digit_5": 0.1, "digit_4": 0.1})["trial_id"] == listed["trial_id"]
    assert point_for_search(config, NAMES, {"minority": 0.1001})["trial_id"] != listed["trial_id"]


def test_one_point_is_the_first_of_the_file_or_the_one_asked_for():
    config = SweepConfig.from_dict(values())
    first, asked = first_point(config, []), first_point(config, ["minority=0.2"])
    assert [p["trial_id"] for p in sweep_points(first, NAMES)] == [sweep_points(config, NAMES)[1]["trial_id"]]
    (point,) = sweep_points(asked, NAMES)
    assert point["thresholds"] == {"digit_4": 0.2, "digit_5": 0.2}
    assert first.base_key() == config.base_key()


@pytest.mark.parametrize("certificate, ends", [(None, True), (False, False), (True, True)])
def test_one_point_of_a_path_is_trained_alone_and_ends_as_it_would_have_among_others(certificate, ends):
    config = SweepConfig.from_dict(values(sweep={"order": "path"}, stopping={"certificate": certificate}))
    alone = first_point(config, ["minority=0.2"])
    assert (alone.sweep.order, alone.stopping.certificate) == ("listed", ends)
    assert first_point(SweepConfig.from_dict(values()), ["minority=0.2"]).stopping.certificate is None


def test_a_fresh_name_counts_on_past_those_taken(tmp_path):
    config = SweepConfig.from_dict(values(storage=str(tmp_path)))
    assert fresh_name(config).name == "small"
    (tmp_path / "small").mkdir()
    (tmp_path / "small-2").mkdir()
    assert fresh_name(config).name == "small-3"


def test_errors_of_a_config_say_where_it_came_from():
    with pytest.raises(ConfigError, match=r"^stored\.yaml: primal\.steps"):
        SweepConfig.from_dict(values(primal={"steps": 0}), source="stored.yaml")


def test_a_check_of_a_section_names_the_field_once_and_by_its_full_path():
    with pytest.raises(ConfigError) as refused:
        SweepConfig.from_dict(
            values(primal={"steps": 5, "warmup_steps": 9}, dual={"rule": "resilient", "step_size": 0.1})
        )
    said = str(refused.value)
    assert "primal.warmup_steps=9 must" in said and "dual: the rule" in said and "dual: dual" not in said


@pytest.mark.parametrize("section", ["primal", "pretrain"])
def test_parts_of_a_batch_that_do_not_divide_its_shards_are_refused_with_a_remedy(section):
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=3 does not divide num_shards=4: give a divisor"):
        SweepConfig.from_dict(values(**{section: {"gradient_accumulation_steps": 3}}))


def test_a_method_whose_loss_needs_the_whole_batch_refuses_its_parts(tmp_path):
    overrides = [f"storage={tmp_path}", "primal.gradient_accumulation_steps=2"]
    with pytest.raises(ConfigError, match="=2: method alignment needs its whole batch"):
        preflight(load_config(EXAMPLES / "gmm_alignment.yaml", overrides, environment=False))
    whole = {name for name, method in METHODS.items() if method.needs_whole_batch({"gradient_norm": None})}
    assert whole == {"alignment", "unlearn_likelihood"}
    scaled = {name for name, method in METHODS.items() if method.needs_whole_batch({"gradient_norm": 0.1})}
    assert scaled == {"alignment", "unlearn_likelihood", "unlearn_forward_kl", "siss"}
