"""Every field has a type and a range; wrong names and values are refused in one clear line."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmask import config
from xmask.config import Config, from_dict, override, preset
from xmask.presets import PROFILES, VARIANTS

BASE = preset("paper", "sha", 10)
FIELDS = sorted({
    name if not isinstance(value, dict) else f"{name}.{part}"
    for name, value in BASE.to_dict().items() for part in (value if isinstance(value, dict) else [""])
})
JUNK = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
        | st.sampled_from(["nan", "-inf", "1e999", "5e-5", "0", 10**400, "synthetic", "test_resnet", 64, 0.25])
        | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))


def _value(values, name):
    for part in name.split("."):
        values = values[part]
    return values


@given(name=st.sampled_from(FIELDS), value=JUNK)
def test_any_value_is_refused_by_name_or_survives_json(name, value):
    try:
        made = override(BASE, {name: value})
    except ValueError as error:
        assert str(error).startswith(name.rpartition(".")[0]) and "\n" not in str(error)
        assert type(error) is ValueError and len(str(error)) < 200
    else:
        assert from_dict(json.loads(json.dumps(made.to_dict()))) == made
        assert math.isfinite(found) if isinstance(
            found := _value(made.to_dict(), name), (int, float)) else True


NESTED = st.recursive(JUNK, lambda inner: st.dictionaries(
    st.sampled_from([*FIELDS, "loss", "schedule", "tau", "consistency"]) | st.integers() | st.text(max_size=4),
    inner, max_size=3), max_leaves=5)


@given(changed=st.dictionaries(st.sampled_from([*BASE.to_dict(), "lose"]), NESTED, max_size=2)
       | NESTED)
def test_any_stored_configuration_is_read_or_refused_with_a_value_error(changed):
    values = BASE.to_dict() | changed if isinstance(changed, dict) else changed
    try:
        from_dict(values)
    except ValueError as error:
        assert type(error) is ValueError


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_configuration_survives_json(profile, variant):
    made = preset(profile, "qnrf", 40, variant=variant)
    assert from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_sections_are_values_with_the_published_defaults():
    assert config.Loss(foreground=0.005) == BASE.loss and config.Evaluation() == BASE.evaluation
    assert config.Decoding() == BASE.pseudo and hash(config.Machine()) == hash(BASE.machine)
    assert override(config.Loss(), {"tau": 0.5}) == config.Loss(tau=0.5)
    with pytest.raises(ValueError, match="^tau: -1 is not a number > 0 and <= 2$"):
        config.Loss(tau=-1)
    with pytest.raises(ValueError, match="frozen"):
        BASE.loss.tau = 0.5


def test_a_number_that_yaml_takes_for_text_is_a_number():
    assert override(BASE, {"optimisation.lr": "5e-5"}).optimisation.lr == 5e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss.tua": 0.5}, "loss.tua: no such field; did you mean loss.tau"),
        ({"tau": 0.5}, r"tau: no such field; did you mean loss.tau\?"),
        ({"loss": {}}, "loss: no such field"),
        ({"loss.tau": "high"}, "loss.tau: 'high' is not a number > 0 and <= 2"),
        ({"loss.tau": -1}, "loss.tau: -1 is not a number > 0"),
        ({"loss.tau": True}, "loss.tau: True is not a number"),
        ({"loss.tau": 10**400}, r"loss.tau: 10+\.\.\. is not a number"),
        ({"loss.background": -0.1}, "loss.background: -0.1 is not a number >= 0"),
        ({"loss.min_radius": 200}, "min_radius <= max_distance must hold, found 200.0, 96.0"),
        ({"schedule.phase1": 1.5}, "schedule.phase1: 1.5 is not a whole number >= 1"),
        ({"schedule.phase1": 5000}, "phase1 <= phase2 <= phase3 must hold, found 5000, 2000, 2100"),
        ({"schedule.steps_per_epoch": -1}, "schedule.steps_per_epoch: -1 is not a whole number"),
        ({"masks.nnec": 1}, "masks.nnec: 1 is not true or false"),
        ({"masks.segmenter": ""}, "masks.segmenter: '' is not classical, bundled or the path"),
        ({"network.weights": "a\0b"}, "network.weights: .* is not imagenet, random or a file"),
        ({"optimisation.crop": 100}, "crop: 100 is not a whole number .* and a multiple of 32"),
        ({"optimisation.crop": 0}, "optimisation.crop: 0 is not"),
        ({"optimisation.batch": 0}, "optimisation.batch: 0 is not a whole number >= 1"),
        ({"optimisation.lr": 1e9}, r"optimisation.lr: 1000000000.0 is not a number > 0 and <= 1$"),
        ({"optimisation.lr": -3}, "optimisation.lr: -3 is not a number > 0"),
        ({"optimisation.lr": math.nan}, "optimisation.lr: nan is not a number"),
        ({"optimisation.lr": "Infinity"}, "optimisation.lr: inf is not a number"),
        ({"optimisation.phase3_lr": 0}, "optimisation.phase3_lr: 0 is not a number > 0"),
        ({"optimisation.ema": 2}, "optimisation.ema: 2 is not a number >= 0 and < 1"),
        ({"optimisation.ema": 1.0}, "optimisation.ema: 1.0 is not"),
        ({"optimisation.scale_min": 2.0}, "scale_min <= scale_max must hold, found 2.0, 1.3"),
        ({"augmentation.blur_min": 3}, "blur_min <= blur_max must hold"),
        ({"augmentation.cutout_min": 0.5}, "cutout_min <= cutout_max must hold"),
        ({"evaluation.point_threshold": 0.6}, "point_threshold <= count_threshold must hold"),
        ({"evaluation.weights": "best"}, "'best' is not one of student, teacher"),
        ({"machine.threads": 100000}, "machine.threads: 100000 is not a whole number >= 0 and <= 10"),
        ({"machine.checkpoint_every": 0}, "machine.checkpoint_every: 0 is not a whole number >= 1"),
        ({"max_side": -5}, "max_side: -5 is not null or a whole number >= 32"),
        ({"seed": 2**32}, "seed: 4294967296 is not a whole number >= 0 and <= 4294967295"),
        ({"selection": "best"}, "selection: 'best' is not one of last, best-on-test"),
        ({"variant": "../x"}, "variant: '../x' is not a name of letters"),
    ],
)
def test_wrong_overrides_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        override(BASE, changes)
    assert next(iter(changes)) in str(refused.value) or "must hold" in message


@pytest.mark.parametrize(
    "values, message",
    [
        ([], r"configuration: \[\] is not an object"),
        ({}, "profile: missing; give one of demo, full, photo, paper"),
        ({"profile": "demo", "dataset": "sha"}, "percent: missing; give a whole number >= 1"),
        (BASE.to_dict() | {"loss": 5}, "loss: 5 is not a section"),
        (BASE.to_dict() | {"loss": {"gamma": 1}}, "loss.gamma: no such field"),
        (BASE.to_dict() | {"loss": {"tau": -1}}, "loss.tau: -1 is not a number > 0"),
        (BASE.to_dict() | {"lose": {}}, "lose: no such field; did you mean loss"),
        (BASE.to_dict() | {"loss": {1: 2}}, "configuration: 1 is not a field's name"),
    ],
)
def test_what_is_no_stored_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_a_run_is_named_after_its_split_seed_and_variant():
    made = Config(profile="demo", dataset="jhu", percent=5, seed=3)
    assert made.run == "jhu-5-s3" and override(made, {"variant": "x1"}).run == "jhu-5-s3-x1"
