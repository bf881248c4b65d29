"""Every number of an experiment in one validated place, each with its range.

A `Config` is made by `preset` (the values live in `xmask.presets`), changed by `override`, and
travels as JSON by `to_dict` and `from_dict`. The defaults of the sections are the published
values that all nine released configurations share. A wrong name or value is a ValueError of one
line: the field, what was found, what is allowed. A comment marks each value that the paper leaves
open and that is therefore our reading.
"""

from __future__ import annotations

import difflib
import types
from typing import Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

Profile = Literal["demo", "photo", "paper"]
Dataset = Literal["sha", "qnrf", "jhu", "shb", "synthetic"]


class Section(BaseModel):
    """Named values that cannot be changed, checked when made: `Loss()`, `Loss(tau=0.5)`.

    Raises ValueError for an unknown name and for a value of another type or out of range. Text
    that is a number will do for a number (YAML takes 5e-5 for text); a bool is no number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_explain(type(self), error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _number_from_text(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and cls.model_fields[str(info.field_name)].annotation is float:
            try:
                return float(value)
            except ValueError:
                pass
        return value

    def _in_order(self, *names: str) -> None:
        found = [getattr(self, name) for name in names]
        if found != sorted(found):
            raise ValueError(f"{names[0]}: {' <= '.join(names)} must hold, "
                             f"found {', '.join(map(str, found))}")


class Network(Section):
    """Paper section on the network."""

    # a name that timm knows, or "slim": the layers of VGG16-BN at 1/8 of the width
    backbone: str = Field("vgg16_bn", pattern=r"^[A-Za-z0-9_.]+$", description="a backbone's name")
    channels: int = Field(256, ge=1, le=4096)  # of fusion, density decoder and mask head
    embedding: int = Field(16, ge=1, le=1024)
    # "imagenet", "random", or the path of a VGG16-BN state dict
    weights: str = Field("imagenet", pattern=r"^[^\x00]+$",
                         description="imagenet, random or a file's path")


class Masks(Section):
    """EDP-SAM: what makes the masks of the labelled images."""

    segmenter: str = Field("classical", pattern=r"^[^\x00]+$",
                           description="classical, bundled or the path of a SAM checkpoint")
    nnec: bool = True
    superpixel_prompt: bool = True


class Loss(Section):
    """Weights and margins of the losses."""

    max_distance: float = Field(96.0, gt=0, le=1e5)  # P2R: px, a cell farther away is nobody's
    min_radius: float = Field(8.0, gt=0, le=1e5)  # P2R: px, lower bound of a region's radius
    distance_cost: float = Field(8.0, ge=0, le=1e3)  # P2R: of a cell at the rim, in logits
    empty_weight: float = Field(0.5, ge=0, le=1e3)  # P2R: weight of a crop without points
    tau: float = Field(0.6, gt=0, le=2)  # exclusivity: boundary in embedding space
    margin: float = Field(0.1, ge=0, le=2)
    push_margins: float = Field(4.0, ge=0, le=100)  # others are pushed beyond tau + 4 margins
    sigma: float = Field(1.5, ge=0, le=100)  # Gaussian smoothing of the embedding, px; 0: none
    differentiable_centers: bool = True
    nnec: bool = True
    ignore_radius: float = Field(16.0, ge=0, le=1e5)  # px around a low-confidence pseudo point
    point_mask: float = Field(1.0, ge=0, le=1e3)  # point-mask term; 0: off, as for all below
    phase2_p2r: float = Field(0.0, ge=0, le=1e3)  # P2R in phase 2 too (ours; the paper: none)
    background: float = Field(0.0, ge=0, le=1e3)  # mask constraint, three weights
    foreground: float = Field(0.0, ge=0, le=1e3)
    one_point: float = Field(0.0, ge=0, le=1e3)

    @model_validator(mode="after")
    def _check(self) -> Loss:
        self._in_order("min_radius", "max_distance")
        return self


class Decoding(Section):
    """Thresholds that turn network output into points and masks; as defaults, pseudo-masks'."""

    point_threshold: float = Field(0.1, ge=0, le=1)  # probability of a point that takes part
    theta: float = Field(0.8, gt=0, le=100)  # energy below which a pixel is a head's
    geometry_weight: float = Field(0.6, ge=0, le=100)  # lambda
    sigma: float = Field(1.5, ge=0, le=100)  # smoothing, px; 0: none
    density_gate: bool = True  # in phase 3 only (release); phase 2 never has it


class Evaluation(Decoding):
    """How test images are decoded, and which network is evaluated."""

    theta: float = Field(1.1, gt=0, le=100)
    geometry_weight: float = Field(0.8, ge=0, le=100)
    sigma: float = Field(3.0, ge=0, le=100)
    density_gate: bool = False
    count_threshold: float = Field(0.5, ge=0, le=1)  # probability above which a point is counted
    weights: Literal["student", "teacher"] = "student"

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        self._in_order("point_threshold", "count_threshold")
        return self


class Schedule(Section):
    """Three phases, in epochs counted from 0; an epoch is `steps_per_epoch` steps."""

    phase1: int = Field(1500, ge=1, le=10**6)  # points: epochs [0, phase1)
    phase2: int = Field(2000, ge=1, le=10**6)  # masks: [phase1, phase2)
    phase3: int = Field(2100, ge=1, le=10**6)  # points under the mask constraint
    steps_per_epoch: int = Field(0, ge=0, le=10**6)  # 0: one pass over all training images
    warmup: int = Field(50, ge=0, le=10**6)  # epochs of phase 1 without unlabelled crops
    mask_warmup: int = Field(50, ge=0, le=10**6)  # the same in phase 2 (our reading)
    ramp: float = Field(0.01, ge=0, le=100)  # growth per epoch of the unlabelled loss's weight
    ramp_start: float = Field(0.1, ge=0, le=100)  # its first value in phase 3
    ramp_end: float = Field(2.0, ge=0, le=100)
    unlabelled: bool = True  # False: supervised only, same number of steps

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        self._in_order("phase1", "phase2", "phase3")
        return self


class Augmentation(Section):
    """How crops vary: a flip of every view, the rest of the student's view of unlabelled crops."""

    flip: float = Field(0.5, ge=0, le=1)  # probability
    jitter: float = Field(0.8, ge=0, le=1)  # probability of a change of all four:
    brightness: float = Field(0.4, ge=0, le=1)
    contrast: float = Field(0.4, ge=0, le=1)
    saturation: float = Field(0.4, ge=0, le=1)
    hue: float = Field(0.1, ge=0, le=0.5)  # share of the colour circle
    grey: float = Field(0.25, ge=0, le=1)  # probability
    blur: float = Field(0.8, ge=0, le=1)  # probability
    blur_min: float = Field(0.1, gt=0, le=100)  # sigma, px
    blur_max: float = Field(2.0, gt=0, le=100)
    cutout_min: float = Field(1 / 8, ge=0, le=1)  # of each side of the crop
    cutout_max: float = Field(1 / 4, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        self._in_order("blur_min", "blur_max")
        self._in_order("cutout_min", "cutout_max")
        return self


class Optimisation(Section):
    """Batches, crops, learning rates, and the teacher's pace."""

    batch: int = Field(16, ge=1, le=4096)  # labelled crops a step, and as many unlabelled ones
    crop: int = Field(256, ge=32, le=8192, multiple_of=32)  # px
    scale_min: float = Field(0.7, gt=0, le=16)
    scale_max: float = Field(1.3, gt=0, le=16)
    lr: float = Field(5e-5, gt=0, le=1)
    encoder_lr: float = Field(1e-5, gt=0, le=1)
    phase2_lr: float = Field(5e-6, gt=0, le=1)
    phase2_encoder_lr: float = Field(0.0, ge=0, le=1)  # 0: frozen, as in the paper
    mask_head_lr: float = Field(5e-6, gt=0, le=1)  # in phase 2; the paper has one rate there
    phase3_lr: float = Field(5e-6, gt=0, le=1)  # published per split, 5e-6 to 5e-5
    decay_every: int = Field(3500, ge=1, le=10**6)  # epochs after which all rates are multiplied
    decay: float = Field(0.9, gt=0, le=1)  # by this (release: StepLR)
    weight_decay: float = Field(1e-4, ge=0, le=1)  # published per split, 1e-6 to 5e-4
    cosine: bool = False  # rates fall to zero over each phase (ours; the paper: no)
    clip: float = Field(5.0, gt=0, le=1e6)  # norm of the gradient
    ema: float = Field(0.998, ge=0, lt=1)  # share of the teacher that a step keeps
    pseudo_threshold: float = Field(0.5, ge=0, le=1)  # of a teacher point in P2R; 0.5: logit >= 0
    confident: float = Field(0.9, ge=0, le=1)  # above it a pseudo point vouches for its mask

    @model_validator(mode="after")
    def _check(self) -> Optimisation:
        self._in_order("scale_min", "scale_max")
        return self


class Machine(Section):
    """What does not belong to the method but to where it runs."""

    threads: int = Field(0, ge=0, le=1024)  # CPU threads of one run; 0: all cores
    workers: int = Field(4, ge=0, le=256)  # processes that load data; 0: in the training process
    cache_images: bool = False  # keep decoded training images in memory
    checkpoint_every: int = Field(10, ge=1, le=10**6)  # epochs


class Config(Section):
    """One experiment: all that decides its numbers. Made by `preset`, changed by `override`."""

    profile: Profile
    dataset: Dataset
    percent: int = Field(ge=1, le=100)  # of the training images that are labelled
    seed: int = Field(2024, ge=0, le=2**32 - 1)
    variant: str = Field("xmask", pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,99}$",
                         description="a name of letters, digits, - and .")
    # px, longer image side; None: the dataset's usual value
    max_side: int | None = Field(None, ge=32, le=10**6)
    # "best-on-test" is the authors' way: it selects on test data
    selection: Literal["last", "best-on-test"] = "last"
    network: Network = Network()
    masks: Masks = Masks()
    loss: Loss = Loss()
    pseudo: Decoding = Decoding()
    evaluation: Evaluation = Evaluation()
    schedule: Schedule = Schedule()
    augmentation: Augmentation = Augmentation()
    optimisation: Optimisation = Optimisation()
    machine: Machine = Machine()

    @property
    def run(self) -> str:
        """The run folder's name: dataset-percent-sSEED, then the variant unless it is xmask."""
        suffix = "" if self.variant == "xmask" else f"-{self.variant}"
        return f"{self.dataset}-{self.percent}-s{self.seed}{suffix}"

    def to_dict(self) -> dict:
        """All fields, nested by section, JSON-ready; `from_dict` reads it back."""
        return self.model_dump()


AnySection = TypeVar("AnySection", bound=Section)


def preset(profile: str, dataset: str, percent: int, **options: Any) -> Config:
    """The configuration of one run: `xmask.presets.preset`, which see."""
    from xmask import presets

    return presets.preset(profile, dataset, percent, **options)


def from_dict(values: dict) -> Config:
    """The inverse of `Config.to_dict`; ValueError for what is no configuration.

    A field that is not there has its default.
    """
    if not isinstance(values, dict):
        raise ValueError(f"configuration: {_short(values)} is not an object with fields by name")
    for part in (values, *values.values()):
        if isinstance(part, dict) and (odd := [key for key in part if not isinstance(key, str)]):
            raise ValueError(f"configuration: {_short(odd[0])} is not a field's name")
    return Config(**_renewed(values))


def override(config: AnySection, changes: dict[str, Any]) -> AnySection:
    """Change fields by dotted name: `override(config, {"loss.tau": 0.5})`, or those of a section:
    `override(config.loss, {"tau": 0.5})`.

    Raises ValueError, with the nearest known name, for a name that does not exist, and with what
    is allowed for a value of another type or out of range.
    """
    values, known = config.model_dump(), _names(type(config))
    for name, value in changes.items():
        if name not in known:
            raise ValueError(_unknown(str(name), known))
        section, _, field = name.rpartition(".")
        (values[section] if section else values)[field] = value
    return type(config)(**values)


def steps_per_epoch(schedule: Schedule, batch: int, images: int) -> int:
    """Steps of an epoch: as set, else one pass over all `images` training images in batches, the
    last of which may be smaller (release: 19, 76 and 142 on SHA, QNRF and JHU)."""
    return schedule.steps_per_epoch or -(-images // batch)


def _renewed(values: dict) -> dict:
    """A configuration stored before the point-mask term had its name: it evaluated the teacher,
    and counted all points that took part."""
    if not isinstance(values.get("loss"), dict) or "consistency" not in values["loss"]:
        return values
    loss = dict(values["loss"])
    loss["point_mask"] = loss.pop("consistency")
    old = values.get("evaluation", {})
    evaluation = old | {"count_threshold": old.get("point_threshold", 0.5), "weights": "teacher"}
    profile = {"reduced": "photo"}.get(values.get("profile", ""), values.get("profile"))
    return values | {"profile": profile, "loss": loss, "evaluation": evaluation}


def _names(kind: type[Section]) -> list[str]:
    """Dotted names of all values of a section and of the sections in it."""
    names = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, Section)
        names += [f"{name}.{part}" for part in _names(inner)] if is_section else [name]
    return names


def _explain(kind: type[Section], error: ValidationError) -> str:
    """The first fault in one line: field, what was found, what is allowed."""
    fault = error.errors(include_url=False)[0]
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return _unknown(name, list(kind.model_fields))
    if fault["type"] == "missing":
        return f"{name}: missing; give {_allowed(kind, name)}"
    if fault["type"] == "value_error":  # said by a section in this one, or by a rule of this one
        return (f"{name}." if name else "") + str(fault["ctx"]["error"])
    name = str(fault["loc"][0])  # a union adds the branch that failed
    return f"{name}: {_short(fault['input'])} is not {_allowed(kind, name)}"


def _allowed(kind: type[Section], name: str) -> str:
    """What a field takes, in words: "a number > 0 and <= 1"."""
    field = kind.model_fields[name]
    if field.description:
        return field.description
    inner: Any = field.annotation
    if get_args(inner) and not isinstance(inner, types.UnionType):
        return f"one of {', '.join(get_args(inner))}"
    optional = "null or " if isinstance(inner, types.UnionType) else ""
    inner = next((k for k in get_args(inner) if k is not type(None)), inner)
    noun = {bool: "true or false", int: "a whole number", float: "a number"}.get(
        inner, "a section, an object with fields by name")
    limits = [f"{sign} {getattr(rule, key):g}" if inner is float else f"{sign} {getattr(rule, key)}"
              for rule in field.metadata
              for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="),
                                ("multiple_of", "a multiple of"))
              if getattr(rule, key, None) is not None]
    return f"{optional}{noun} {' and '.join(limits)}".strip()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    near += [k for k in known if k.rpartition(".")[2] == name and k not in near]
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    return f"{name}: no such field{hint}"
