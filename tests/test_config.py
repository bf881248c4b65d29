"""The presets hold the published numbers; wrong names and values are refused with a hint."""

import json

import pytest

from xmask.config import ABLATIONS, DATASETS, PERCENTS, PROFILES, Config, from_dict, override, preset


@pytest.mark.parametrize("profile", PROFILES)
def test_every_split_of_every_profile_has_a_configuration(profile):
    names = {preset(profile, d, p, seed=1).run for d in DATASETS for p in PERCENTS}
    assert len(names) == 9


def test_the_paper_preset_holds_the_published_constants():
    c = preset("paper", "sha", 10)
    assert (c.network.backbone, c.network.channels, c.network.embedding) == ("vgg16_bn", 256, 16)
    assert (c.loss.max_distance, c.loss.min_radius) == (96, 8)
    assert (c.loss.distance_cost, c.loss.empty_weight, c.loss.push_margins) == (8, 0.5, 4)
    a = c.augmentation
    assert (a.flip, a.jitter, a.grey, a.blur) == (0.5, 0.8, 0.25, 0.8)
    assert (a.brightness, a.contrast, a.saturation, a.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (a.blur_min, a.blur_max, a.cutout_min, a.cutout_max) == (0.1, 2, 1 / 8, 1 / 4)
    assert (c.loss.tau, c.loss.margin, c.loss.sigma, c.loss.ignore_radius) == (0.6, 0.1, 1.5, 16)
    assert (c.pseudo.theta, c.pseudo.geometry_weight, c.pseudo.sigma) == (0.8, 0.6, 1.5)
    assert (c.evaluation.theta, c.evaluation.geometry_weight, c.evaluation.sigma) == (1.1, 0.8, 3)
    s, o = c.schedule, c.optimisation
    assert (s.phase1, s.phase2, s.phase3) == (1500, 2000, 2100)
    assert (s.warmup, s.mask_warmup) == (50, 50)
    assert (s.ramp, s.ramp_start, s.ramp_end) == (0.01, 0.1, 2.0)
    assert (o.batch, o.crop, o.scale_min, o.scale_max) == (16, 256, 0.7, 1.3)
    assert (o.lr, o.encoder_lr, o.phase2_lr, o.phase3_lr) == (5e-5, 1e-5, 5e-6, 5e-6)
    assert (o.weight_decay, o.clip, o.ema, o.confident) == (1e-4, 5, 0.998, 0.9)
    assert (o.phase2_encoder_lr, c.loss.phase2_p2r) == (0, 0)
    assert c.seed == 2024 and c.selection == "last" and not o.cosine


@pytest.mark.parametrize(
    "dataset, percent, values",
    [
        ("sha", 5, {"schedule.phase3": 2100, "loss.foreground": 0.005, "loss.consistency": 10}),
        ("sha", 40, {"schedule.phase3": 2075, "loss.background": 0.1, "loss.foreground": 0.005,
                     "loss.consistency": 0, "pseudo.theta": 0.95,
                     "pseudo.geometry_weight": 0.4}),
        ("qnrf", 5, {"schedule.phase3": 2050, "loss.background": 0.05,
                     "loss.foreground": 0.0025}),
        ("qnrf", 10, {"schedule.phase3": 2500, "loss.one_point": 1, "loss.consistency": 1}),
        ("qnrf", 40, {"schedule.phase3": 4000, "loss.background": 0.01,
                      "loss.one_point": 0.005}),
        ("jhu", 5, {"schedule.phase3": 2300, "loss.background": 0.05, "loss.one_point": 0.01}),
        ("jhu", 10, {"schedule.phase3": 2300, "loss.background": 0.05, "loss.one_point": 0}),
    ],
)
def test_the_paper_preset_varies_by_dataset_and_percentage(dataset, percent, values):
    config = preset("paper", dataset, percent).to_dict()
    for name, value in values.items():
        section, field = name.split(".")
        assert config[section][field] == value, name


@pytest.mark.parametrize("field, value", [("percent", "ten"), ("percent", 2.5), ("seed", "abc")])
def test_a_split_is_named_by_whole_numbers(field, value):
    with pytest.raises(ValueError, match=f"{field}: {value!r} is not a whole number"):
        preset("demo", "sha", **{"percent": 10, "seed": 1} | {field: value})


def test_a_configuration_survives_json():
    config = preset("demo", "qnrf", 40, variant="without-smoothing")
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("variant", ABLATIONS)
def test_an_ablation_changes_the_configuration_and_the_name(variant):
    base = preset("demo", "sha", 40, seed=1)
    other = preset("demo", "sha", 40, seed=1, variant=variant)
    assert other.run == f"sha-40-s1-{variant}"
    assert {**other.to_dict(), "variant": "xmask"} != base.to_dict()


def test_a_number_that_yaml_takes_for_text_is_a_number():
    assert override(preset("demo", "sha", 10), {"optimisation.lr": "5e-5"}).optimisation.lr == 5e-5


def test_overrides_change_the_name_but_not_for_the_paths_of_weights():
    swept = preset("demo", "sha", 10, seed=1, overrides={"loss.tau": 0.5})
    assert swept.loss.tau == 0.5
    assert swept.run.startswith("sha-10-s1-x") and swept.run != preset(
        "demo", "sha", 10, seed=1, overrides={"loss.tau": 0.4}).run
    assert preset("demo", "sha", 10, seed=1,
                  overrides={"masks.segmenter": "sam.pth"}).run == "sha-10-s1"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss.tua": 0.5}, "loss.tua: no such field; did you mean loss.tau"),
        ({"tau": 0.5}, "tau: no such field"),
        ({"loss.tau": "high"}, "loss.tau: expected float, found 'high'"),
        ({"schedule.phase1": 1.5}, "schedule.phase1: expected int"),
        ({"masks.nnec": 1}, "masks.nnec: expected bool"),
        ({"optimisation.crop": 100}, "multiple of 32"),
        ({"optimisation.batch": 0}, "batch: 0 is not a positive"),
        ({"schedule.phase1": 5000}, "phases must end in order"),
        ({"optimisation.scale_min": 2.0}, "scale_min <= scale_max"),
        ({"selection": "best"}, "selection: 'best' is not one of last, best-on-test"),
    ],
)
def test_wrong_overrides_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        override(preset("paper", "sha", 10), changes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nightly", "sha", 10), "profile: 'nightly' is not one of demo, reduced, paper"),
        (("demo", "shanghai", 10), "dataset: 'shanghai' is not one of"),
        (("demo", "sha", 0), "percent: 0 is not in 1..100"),
    ],
)
def test_wrong_presets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


def test_an_unknown_variant_and_an_unknown_stored_field_are_refused():
    with pytest.raises(ValueError, match="variant: 'none' is not one of xmask"):
        preset("demo", "sha", 10, variant="none")
    values = preset("demo", "sha", 10).to_dict()
    values["loss"]["gamma"] = 1
    with pytest.raises(ValueError, match="loss.gamma: no such field"):
        from_dict(values)
    assert isinstance(from_dict(preset("demo", "sha", 10).to_dict()), Config)
