"""The profile `paper` is the release, value by value; the others are named and complete."""

import json
from pathlib import Path

import pytest

from xmask.config import preset
from xmask.presets import ABLATIONS, DATASETS, PERCENTS, POINTS_ONLY, PROFILES
from xmask.study.runs import by_dotted_name

HERE = Path(__file__).parent
RELEASE = json.loads((HERE / "release.json").read_text(encoding="utf-8"))
SHARED = HERE.parents[1] / "shared/paper/release.json"

COMMON = {  # key of release.json -> fields
    "seed": ["seed"], "batch_labelled": ["optimisation.batch"],
    "batch_unlabelled": ["optimisation.batch"], "crop": ["optimisation.crop"],
    "lr": ["optimisation.lr"], "encoder_lr": ["optimisation.encoder_lr"],
    "phase2_lr": ["optimisation.phase2_lr", "optimisation.mask_head_lr"],
    "clip": ["optimisation.clip"], "ema": ["optimisation.ema"],
    "phase1_end": ["schedule.phase1"], "phase2_end": ["schedule.phase2"],
    "warmup": ["schedule.warmup"], "tau": ["loss.tau"], "margin": ["loss.margin"],
    "ignore_radius": ["loss.ignore_radius"], "p_low": ["pseudo.point_threshold"],
    "p_high": ["optimisation.confident"],
}
PER_SPLIT = {
    "epochs": "schedule.phase3", "phase3_lr": "optimisation.phase3_lr",
    "weight_decay": "optimisation.weight_decay", "theta": "pseudo.theta",
    "lambda": "pseudo.geometry_weight", "point_mask": "loss.point_mask",
    "background": "loss.background", "foreground": "loss.foreground",
    "one_point": "loss.one_point",
}
EVALUATION = {
    "theta": "theta", "lambda": "geometry_weight", "sigma": "sigma",
    "point_threshold_segmentation": "point_threshold", "point_threshold_count": "count_threshold",
    "weights": "weights",
}


def released(split):
    """Every field that the release decides, by dotted name, with its value for a split."""
    common = RELEASE["common"]
    wanted = {field: common[key] for key, fields in COMMON.items() for field in fields}
    wanted |= {field: RELEASE["splits"][split][key] for key, field in PER_SPLIT.items()}
    wanted |= {f"evaluation.{field}": common["evaluation"][key]
               for key, field in EVALUATION.items()}
    return wanted | {
        "optimisation.scale_min": common["scale"][0],
        "optimisation.scale_max": common["scale"][1],
        "optimisation.decay_every": common["step_lr"]["every_epochs"],
        "optimisation.decay": common["step_lr"]["factor"],
        "pseudo.density_gate": common["density_gate"]["phase3"],
        "evaluation.density_gate": common["density_gate"]["evaluation"],
        # of its text: what the code does
        "schedule.steps_per_epoch": 0, "optimisation.pseudo_threshold": 0.5,
        "optimisation.phase2_encoder_lr": 0, "optimisation.cosine": False,
        "network.backbone": "vgg16_bn", "network.weights": "imagenet", "network.channels": 256,
        "network.embedding": 16, "network.fold_norm": False, "network.freeze_stride": 0,
        "schedule.unlabelled": True, "loss.phase2_p2r": 0,
        "augmentation.labelled_jitter": 0, "calibration.held_out": 0, "evaluation.nnec": True,
        "evaluation.scale": 1, "evaluation.peaks": False, "pseudo.peaks": False,
        "calibration.expected": False,
        # METHOD: the three phases' ramps, P2R, smoothing and the strong view
        "schedule.ramp": 0.01, "schedule.ramp_start": 0.1, "schedule.ramp_end": 2,
        "loss.max_distance": 96, "loss.min_radius": 8, "loss.distance_cost": 8,
        "loss.empty_weight": 0.5, "loss.push_margins": 4, "loss.sigma": 1.5, "pseudo.sigma": 1.5,
        "augmentation.flip": 0.5, "augmentation.jitter": 0.8, "augmentation.grey": 0.25,
        "augmentation.blur": 0.8, "augmentation.brightness": 0.4, "augmentation.contrast": 0.4,
        "augmentation.saturation": 0.4, "augmentation.hue": 0.1, "augmentation.blur_min": 0.1,
        "augmentation.blur_max": 2, "augmentation.cutout_min": 1 / 8,
        "augmentation.cutout_max": 1 / 4,
    }


def flat(config):
    values = {}
    for name, value in config.to_dict().items():
        values |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {
            name: value}
    return values


# what the release leaves to its user or to us
OURS = {"profile", "dataset", "percent", "variant", "max_side", "selection", "masks.segmenter",
        "masks.nnec", "masks.superpixel_prompt", "loss.differentiable_centers", "loss.nnec",
        "schedule.mask_warmup", "machine.threads", "machine.workers", "machine.cache_images",
        "machine.checkpoint_every", "machine.precision", "calibration.coverage"}


@pytest.mark.parametrize("split", RELEASE["splits"])
def test_the_paper_profile_is_the_release(split):
    dataset, percent = split.split("-")
    found = flat(preset("paper", dataset, int(percent)))
    wrong = [f"{split}: {field} is {found[field]}, released {value}"
             for field, value in released(split).items() if found[field] != value]
    assert not wrong, "\n".join(wrong)


def test_every_field_is_released_or_known_to_be_ours():
    assert set(flat(preset("paper", "sha", 5))) == set(released("sha-5")) | OURS
    known = {*COMMON, "scale", "step_lr", "density_gate", "evaluation"}
    assert set(RELEASE["common"]) == known
    assert all(set(values) == set(PER_SPLIT) for values in RELEASE["splits"].values())
    # 7 x 7 smoothing is the only kernel there is; phase 2 has no gate
    assert RELEASE["common"]["evaluation"]["kernel"] == 7
    assert RELEASE["common"]["density_gate"]["phase2"] is False


@pytest.mark.skipif(not SHARED.is_file(), reason="the page of released values is not here")
def test_the_facts_beside_this_test_are_those_of_the_page():
    page = json.loads(SHARED.read_text(encoding="utf-8"))
    assert {k: RELEASE[k] for k in ("common", "splits")} == {k: page[k] for k in ("common", "splits")}


@pytest.mark.parametrize("dataset, percent", [("shb", 5), ("sha", 20), ("synthetic", 10)])
def test_the_paper_profile_has_no_values_of_other_splits(dataset, percent):
    with pytest.raises(ValueError, match=f"^profile paper: .*no values for {dataset} at {percent}%,"
                                         " .*sha, qnrf and jhu at 5, 10 and 40%; choose one"):
        preset("paper", dataset, percent)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_split_of_every_profile_has_a_configuration(profile):
    assert len({preset(profile, d, p, seed=1).run for d in DATASETS for p in PERCENTS}) == 9


@pytest.mark.parametrize("profile", ["demo", "photo"])
def test_on_a_cpu_the_teacher_is_evaluated_at_one_threshold(profile):
    c = preset(profile, "sha", 40)
    assert c.evaluation.weights == "teacher" and not c.pseudo.density_gate
    assert c.evaluation.point_threshold == c.evaluation.count_threshold == 0.5


@pytest.mark.parametrize("profile, percent, few", [
    ("photo", 5, False), ("photo", 10, True), ("photo", 40, False), ("photo", 100, False),
    ("demo", 5, False), ("paper", 5, False)])
def test_photographs_with_few_labels_are_counted_by_peaks_and_none_is_held_out(
        profile, percent, few):
    c = preset(profile, "sha", percent)
    assert c.pseudo.peaks == c.evaluation.peaks == c.calibration.expected == few
    assert (c.calibration.held_out > 0) == (profile == "photo" and percent >= 40)
    assert c.evaluation.scale == (1.25 if profile == "photo" and percent >= 10 else 1)


@pytest.mark.parametrize("variant", ABLATIONS)
def test_an_ablation_changes_the_configuration_and_the_name(variant):
    base = preset("demo", "sha", 40, seed=1)
    other = preset("demo", "sha", 40, seed=1, variant=variant)
    assert other.run == f"sha-40-s1-{variant}"
    assert {**other.to_dict(), "variant": "xmask"} != base.to_dict()


def test_overrides_change_the_name_by_value_but_not_for_the_paths_of_weights():
    def run(**overrides):
        return preset("demo", "sha", 10, seed=1, overrides={
            k.replace("__", "."): v for k, v in overrides.items()})

    assert run(loss__tau=0.5).loss.tau == 0.5
    assert run(loss__tau=0.5).run.startswith("sha-10-s1-x")
    assert run(loss__tau=0.5).run == run(loss__tau="5e-1").run != run(loss__tau=0.4).run
    assert run(masks__segmenter="sam.pth").run == "sha-10-s1"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nightly", "sha", 10), "profile: 'nightly' is not one of demo, full, photo, paper"),
        (("demo", "shanghai", 10), "dataset: 'shanghai' is not one of"),
        (("demo", "sha", 0), "percent: 0 is not a whole number >= 1 and <= 100"),
        (("demo", "sha", "ten"), "percent: 'ten' is not a whole number"),
        (("demo", "sha", 2.5), "percent: 2.5 is not a whole number"),
    ],
)
def test_wrong_presets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


def test_a_wrong_seed_or_variant_is_refused():
    with pytest.raises(ValueError, match="seed: 'abc' is not a whole number"):
        preset("demo", "sha", 10, seed="abc")
    with pytest.raises(ValueError, match="variant: 'none' is not one of xmask"):
        preset("demo", "sha", 10, variant="none")


@pytest.mark.parametrize("profile", ["demo", "full", "photo", "paper"])
def test_points_only_spends_every_step_on_points_and_its_rival_differs_by_unlabelled_images(profile):
    teacher, alone = (preset(profile, "sha", 10, variant=v) for v in POINTS_ONLY)
    whole = preset(profile, "sha", 10).schedule.phase3
    for one in (teacher.schedule, alone.schedule):
        assert one.phase1 == one.phase2 == one.phase3 == whole
    differ = {name for name, value in by_dotted_name(teacher.to_dict()).items()
              if by_dotted_name(alone.to_dict())[name] != value}
    assert differ == {"variant", "schedule.unlabelled"} and not alone.schedule.unlabelled
