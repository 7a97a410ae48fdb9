"""Every option has a range, an error message and documentation."""

import dataclasses
import json

import pytest

from hf_dms.config import LAYOUTS, PIPELINES, RESOURCE_SCOPES, RESOURCES, TARGET_SCHEDULES, DMSConfig, amount


def test_every_option_has_help_text():
    for option in dataclasses.fields(DMSConfig):
        assert len(option.metadata["help"]) > 20, option.name


def test_defaults_are_those_of_the_documents():
    config = DMSConfig(target=0.6)
    assert (config.resource, config.resource_scope, config.layout, config.pipeline) == (
        "params",
        "model",
        "uniform",
        "p",
    )
    assert config.prune is None
    assert config.round_to == {}
    assert config.protect == {}
    assert config.importance_decay == 0.99
    assert config.target_schedule == "geometric"


def test_configs_share_no_defaults():
    first, second = DMSConfig(target=0.6), DMSConfig(target=0.6)
    first.protect["layers"] = [0]
    first.round_to["mlp"] = 8
    assert second.protect == {}
    assert second.round_to == {}


@pytest.mark.parametrize("target", [1e-6, 0.5, 1, 1.0])
def test_targets_in_range_are_taken(target):
    assert DMSConfig(target=target).target == target


@pytest.mark.parametrize(("text", "expected"), [("0.6", 0.6), ("1e-1", 0.1), ("100M", "100M"), ("1.5b", "1.5b")])
def test_targets_may_be_text_and_amounts(text, expected):
    config = DMSConfig(target=text)
    assert config.target == expected
    assert DMSConfig(**config.to_dict()) == config


def test_an_amount_is_a_number_with_a_multiple():
    assert [amount(text) for text in ("20K", "100M", "1.5B", "1.5g", "2T")] == [2e4, 1e8, 1.5e9, 1.5e9, 2e12]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "dms.target is required: the fraction of the dense resource to keep. For 60 % write target: 0.6"),
        (60, r"dms.target must be in \(0, 1\], got 60. For 60 % write target: 0.6$"),
        (0, r"dms.target must be in \(0, 1\], got 0\.$"),
        (-0.5, r"dms.target must be in \(0, 1\], got -0.5\.$"),
        (600, r"dms.target must be in \(0, 1\], got 600\.$"),
        (float("nan"), r"dms.target must be in \(0, 1\], got nan"),
        (1e8, r"dms.target must be in \(0, 1\], got 1e\+08. For an amount write target: 100M"),
        ("60", r"dms.target must be in \(0, 1\], got 60. For 60 % write target: 0.6"),
        ("100 M", r"dms.target must be a number in \(0, 1\], or an amount such as 100M, got '100 M'"),
        ("0M", r"or an amount such as 100M, got '0M'"),
        ([0.5], r"dms.target must be a number in \(0, 1\], got \[0.5\]"),
        (True, r"dms.target must be a number in \(0, 1\], got True"),
    ],
)
def test_targets_out_of_range_are_errors_that_teach(target, message):
    with pytest.raises(ValueError, match=message):
        DMSConfig(target=target)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("resource", RESOURCES),
        ("resource_scope", RESOURCE_SCOPES),
        ("layout", LAYOUTS),
        ("pipeline", PIPELINES),
        ("target_schedule", TARGET_SCHEDULES),
    ],
)
def test_choices_are_checked(name, allowed):
    for value in allowed:
        assert getattr(DMSConfig(target=0.5, **{name: value}), name) == value
    with pytest.raises(ValueError, match=f"dms.{name} must be one of {', '.join(allowed)}; got 'other'"):
        DMSConfig(target=0.5, **{name: "other"})


@pytest.mark.parametrize(
    ("name", "good", "bad", "interval"),
    [
        ("importance_decay", [0, 0.5], [1, -0.1], r"\[0, 1\)"),
        ("target_ramp", [1e-3, 1], [0, 1.1], r"\(0, 1\]"),
        ("warmup_steps", [0, 100], [-1], r"\[0, inf\)"),
        ("resource_weight", [0, 1e6], [-1.0, float("inf")], r"\[0, inf\)"),
        ("gate_learning_rate", [0, 0.1, None], [-1.0], r"\[0, inf\)"),
        ("sharpness", [0.5, 8, None], [0, -1], r"\(0, inf\)"),
        ("sequence_length", [1, 4096, None], [0], r"\[1, inf\)"),
    ],
)
def test_numbers_are_checked(name, good, bad, interval):
    for value in good:
        assert getattr(DMSConfig(target=0.5, **{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError, match=f"dms.{name} must be in {interval}, got {value}"):
            DMSConfig(target=0.5, **{name: value})
    for value in ("3", True):
        with pytest.raises(ValueError, match=f"dms.{name} must be a (whole )?number, got {value!r}"):
            DMSConfig(target=0.5, **{name: value})


@pytest.mark.parametrize("name", ["warmup_steps", "sequence_length"])
def test_counts_are_whole(name):
    with pytest.raises(ValueError, match=f"dms.{name} must be a whole number, got 2.5"):
        DMSConfig(target=0.5, **{name: 2.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prune="mlp"), r"dms.prune must be a list of dim names such as \[kv, mlp\], got 'mlp'"),
        (dict(prune=[1]), r"dms.prune must be a list of dim names such as \[kv, mlp\], got \(1,\)"),
        (dict(prune=[]), "dms.prune is empty: name at least one dim, or leave it out to prune all"),
        (dict(round_to=8), "dms.round_to must map a dim to a whole number of at least 1, as {mlp: 64}; got 8"),
        (dict(round_to={"mlp": 0}), "dms.round_to must map .* got {'mlp': 0}"),
        (dict(round_to={"mlp": 1.5}), "dms.round_to must map .* got {'mlp': 1.5}"),
        (dict(protect=[0]), r"dms.protect must be a mapping with keys of layers, dims, min, max; got \[0\]"),
        (dict(protect={"layer": [0]}), "dms.protect has no key 'layer'; its keys are layers, dims, min, max"),
        (dict(protect={"layers": 0}), "dms.protect.layers must be a list, got 0"),
        (dict(protect={"min": [1]}), r"dms.protect.min must be a dict, got \[1\]"),
    ],
)
def test_names_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DMSConfig(target=0.5, **options)


def test_a_config_survives_json():
    config = DMSConfig(target=0.5, prune=["kv", "mlp"], round_to={"mlp": 8}, protect={"layers": [0], "min": {"kv": 2}})
    assert config.prune == ("kv", "mlp")
    assert DMSConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("steps", "rate"), [(0, 0.05), (20, 0.05), (200, 0.01), (1000, 0.002), (10**6, 0.002)])
def test_the_default_rate_of_the_gates_is_two_over_the_steps_within_bounds(steps, rate):
    config = DMSConfig(target=0.5)
    assert config.with_defaults_for(steps).gate_learning_rate == pytest.approx(rate)
    assert config.gate_learning_rate is None
    assert DMSConfig(target=0.5, gate_learning_rate=0.3).with_defaults_for(steps).gate_learning_rate == 0.3
