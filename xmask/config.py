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
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

Profile = Literal["demo", "full", "photo", "paper"]
Dataset = Literal["sha", "qnrf", "jhu", "shb", "synthetic", "own"]  # own: photos of `xmask learn`
AnySection = TypeVar("AnySection", bound="Section")

# Ranges: 0 is allowed where it means "off" or "none"; upper bounds only catch slips of the pen.
Share = Annotated[float, Field(ge=0, le=1)]  # also a probability
Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Amount = Annotated[float, Field(ge=0, le=100)]
PositiveAmount = Annotated[float, Field(gt=0, le=100)]
Pixels = Annotated[float, Field(ge=0, le=10**5)]
PositivePixels = Annotated[float, Field(gt=0, le=10**5)]
Count = Annotated[int, Field(ge=1, le=10**6)]
CountOrZero = Annotated[int, Field(ge=0, le=10**6)]
Size = Annotated[int, Field(ge=1, le=4096)]
Text = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Section(BaseModel):
    """Named values that cannot be changed, checked when made: `Loss()`, `Loss(tau=0.5)`.

    Raises ValueError for an unknown name and for a value of another type or out of range. Text
    that is a number will do for a number (YAML takes 5e-5 for text); a bool is no number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    ascending: ClassVar[tuple[tuple[str, ...], ...]] = ()  # fields of which none exceeds the next

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

    @model_validator(mode="after")
    def _in_order(self: AnySection) -> AnySection:
        for names in self.ascending:
            found = [getattr(self, name) for name in names]
            if found != sorted(found):
                raise ValueError(f"{names[0]}: {' <= '.join(names)} must hold, "
                                 f"found {', '.join(map(str, found))}; set them together")
        return self


class Network(Section):
    """Paper section on the network."""

    # a name that timm knows
    backbone: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9_.]+$", description="a backbone's name")] = "vgg16_bn"
    channels: Size = 256  # of fusion, density decoder and mask head
    embedding: Size = 16
    # "imagenet", "random", or the path of the backbone's state dict
    weights: Annotated[
        Text, Field(description="imagenet, random or a file's path")] = "imagenet"
    # BatchNorm of the encoder is folded into its convolutions: for small batches, and faster
    fold_norm: bool = False
    # the encoder's layers up to its map of this stride keep their first weights; 0: all learn
    freeze_stride: Literal[0, 4, 8] = 0

    @model_validator(mode="after")
    def _weights_to_keep(self) -> Network:
        if self.weights == "random" and (self.fold_norm or self.freeze_stride):
            raise ValueError("weights: random, but fold_norm and freeze_stride keep what an "
                             "encoder has learnt; set fold_norm=false and freeze_stride=0 as well")
        return self


class Masks(Section):
    """EDP-SAM: what makes the masks of the labelled images."""

    segmenter: Annotated[Text, Field(
        description="classical, bundled or the path of a SAM checkpoint")] = "classical"
    nnec: bool = True
    superpixel_prompt: bool = True


class Loss(Section):
    """Weights and margins of the losses."""

    max_distance: PositivePixels = 96.0  # P2R: px, a cell farther away is nobody's
    min_radius: PositivePixels = 8.0  # P2R: px, lower bound of a region's radius
    distance_cost: Weight = 8.0  # P2R: of a cell at the rim, in logits
    empty_weight: Weight = 0.5  # P2R: weight of a crop without points
    tau: Annotated[float, Field(gt=0, le=2)] = 0.6  # exclusivity: boundary in embedding space
    margin: Annotated[float, Field(ge=0, le=2)] = 0.1
    push_margins: Amount = 4.0  # others are pushed beyond tau + 4 margins
    sigma: Amount = 1.5  # Gaussian smoothing of the embedding, px; 0: none
    differentiable_centers: bool = True
    nnec: bool = True
    ignore_radius: Pixels = 16.0  # px around a low-confidence pseudo point
    point_mask: Weight = 1.0  # point-mask term; 0: off, as for all below
    phase2_p2r: Weight = 0.0  # P2R in phase 2 too (ours; the paper: none)
    background: Weight = 0.0  # mask constraint, three weights
    foreground: Weight = 0.0
    one_point: Weight = 0.0
    ascending = (("min_radius", "max_distance"),)


class Decoding(Section):
    """Thresholds that turn network output into points and masks; as defaults, pseudo-masks'."""

    point_threshold: Share = 0.1  # probability of a point that takes part
    theta: PositiveAmount = 0.8  # energy below which a pixel is a head's
    geometry_weight: Amount = 0.6  # lambda
    sigma: Amount = 1.5  # smoothing, px; 0: none
    density_gate: bool = True  # in phase 3 only (release); phase 2 never has it
    # points are only cells that none of their eight neighbours exceeds (ours; the paper: all cells)
    peaks: bool = False


class Evaluation(Decoding):
    """How test images are decoded, and which network is evaluated."""

    theta: PositiveAmount = 1.1
    geometry_weight: Amount = 0.8
    sigma: Amount = 3.0
    density_gate: bool = False
    nnec: bool = True  # False: one circle for all heads, an ablation
    count_threshold: Share = 0.5  # probability above which a point is counted
    weights: Literal["student", "teacher"] = "student"
    # sides of the image that the network sees, over its own (ours; the paper: 1)
    scale: Annotated[float, Field(ge=0.25, le=4)] = 1.0
    ascending = (("point_threshold", "count_threshold"),)


class Schedule(Section):
    """Three phases, in epochs counted from 0; an epoch is `steps_per_epoch` steps."""

    phase1: Count = 1500  # points: epochs [0, phase1)
    phase2: Count = 2000  # masks: [phase1, phase2)
    phase3: Count = 2100  # points under the mask constraint
    steps_per_epoch: CountOrZero = 0  # 0: one pass over all training images
    warmup: CountOrZero = 50  # epochs of phase 1 without unlabelled crops
    mask_warmup: CountOrZero = 50  # the same in phase 2 (our reading)
    ramp: Amount = 0.01  # growth per epoch of the unlabelled loss's weight
    ramp_start: Amount = 0.1  # its first value in phase 3
    ramp_end: Amount = 2.0
    unlabelled: bool = True  # False: supervised only, same number of steps
    ascending = (("phase1", "phase2", "phase3"),)


class Augmentation(Section):
    """How crops vary: a flip of every view, the rest of the student's view of unlabelled crops."""

    flip: Share = 0.5  # probability
    jitter: Share = 0.8  # probability of a change of all four:
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # share of the colour circle
    labelled_jitter: Share = 0.0  # the same four of labelled crops, times this (ours; paper: none)
    grey: Share = 0.25  # probability
    blur: Share = 0.8  # probability
    blur_min: PositiveAmount = 0.1  # sigma, px
    blur_max: Annotated[float, Field(gt=0, le=10)] = 2.0  # three of it fit the smallest crop
    cutout_min: Share = 1 / 8  # of each side of the crop
    cutout_max: Share = 1 / 4
    ascending = (("blur_min", "blur_max"), ("cutout_min", "cutout_max"),)


class Optimisation(Section):
    """Batches, crops, learning rates, and the teacher's pace."""

    batch: Size = 16  # labelled crops a step, and as many unlabelled ones
    crop: Annotated[int, Field(ge=32, le=8192, multiple_of=32)] = 256  # px
    scale_min: PositiveAmount = 0.7
    scale_max: PositiveAmount = 1.3
    lr: Rate = 5e-5
    encoder_lr: Rate = 1e-5
    phase2_lr: Rate = 5e-6
    phase2_encoder_lr: Share = 0.0  # 0: frozen, as in the paper
    mask_head_lr: Rate = 5e-6  # in phase 2; the paper has one rate there
    phase3_lr: Rate = 5e-6  # published per split, 5e-6 to 5e-5
    decay_every: Count = 3500  # epochs after which all rates are multiplied
    decay: Rate = 0.9  # by this (release: StepLR)
    weight_decay: Share = 1e-4  # published per split, 1e-6 to 5e-4
    cosine: bool = False  # rates fall to zero over each phase (ours; the paper: no)
    clip: Annotated[float, Field(gt=0, le=10**6)] = 5.0  # norm of the gradient
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.998  # share of the teacher that a step keeps
    # probability of a teacher point in P2R; 0.5: logit > 0. None: as many points as the teacher
    # expects heads (ours)
    pseudo_threshold: Share | None = 0.5
    confident: Share = 0.9  # above it a pseudo point vouches for its mask
    ascending = (("scale_min", "scale_max"),)


class Calibration(Section):
    """What sets the count's threshold, and its interval; the paper has neither.

    Labelled images that training does not see, or what the network expects on those it saw."""

    held_out: Share = 0.0  # of the labelled images; 0: none
    coverage: Annotated[float, Field(gt=0, lt=1)] = 0.9  # of the count's interval
    # where none is held out: of the images that training learnt from, count as many heads as the
    # network expects there; no interval then
    expected: bool = False


class Machine(Section):
    """What does not belong to the method but to where it runs."""

    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # CPU threads of one run; 0: all cores
    # processes that load data; 0: in the training process
    workers: Annotated[int, Field(ge=0, le=256)] = 4
    cache_images: bool = False  # keep decoded training images in memory
    # of the network in training: bfloat16 (mixed) where the device has instructions for it, else
    # float32, in which it always predicts
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: Count = 10  # epochs


class Config(Section):
    """One experiment: all that decides its numbers. Made by `preset`, changed by `override`."""

    profile: Profile
    dataset: Dataset
    percent: Annotated[int, Field(ge=1, le=100)]  # of the training images that are labelled
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 2024
    variant: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,99}$",
                                  description="a name of letters, digits, - and .")] = "xmask"
    # px, longer image side; None: the dataset's usual value
    max_side: Annotated[int | None, Field(ge=32, le=10**6)] = None
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
    calibration: Calibration = Calibration()
    machine: Machine = Machine()

    @property
    def run(self) -> str:
        """The run folder's name: dataset-percent-sSEED, then the variant unless it is xmask."""
        suffix = "" if self.variant == "xmask" else f"-{self.variant}"
        return f"{self.dataset}-{self.percent}-s{self.seed}{suffix}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested by section, JSON-ready; `from_dict` reads it back."""
        return self.model_dump()


def preset(profile: str, dataset: str, percent: int, **options: Any) -> Config:
    """The configuration of one run: `xmask.presets.preset`, which see."""
    from xmask import presets

    return presets.preset(profile, dataset, percent, **options)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `Config.to_dict`; ValueError for what is no configuration.

    A field that is not there has its default.
    """
    if not isinstance(values, dict):
        raise ValueError(f"configuration: {_short(values)} is not an object with fields by name")
    for part in (values, *values.values()):
        if isinstance(part, dict) and (odd := [key for key in part if not isinstance(key, str)]):
            raise ValueError(f"configuration: {_short(odd[0])} is not a field's name")
    return Config(**values)


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


def _names(kind: type[Section]) -> list[str]:
    """Dotted names of all values of a section and of the sections in it."""
    names = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            names += [f"{name}.{part}" for part in _names(inner)]
        else:
            names.append(name)
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
        return (f"{name}." if name else "") + str(fault.get("ctx", {})["error"])
    name = str(fault["loc"][0])  # a union adds the branch that failed
    return f"{name}: {_short(fault['input'])} is not {_allowed(kind, name)}"


def _allowed(kind: type[Section], name: str) -> str:
    """What a field takes, in words: "a number > 0 and <= 1"."""
    field = kind.model_fields[name]
    if field.description:
        return field.description
    inner: Any = field.annotation
    if get_args(inner) and not isinstance(inner, types.UnionType):
        return f"one of {', '.join(map(str, get_args(inner)))}"
    optional = "null or " if isinstance(inner, types.UnionType) else ""
    inner = next((k for k in get_args(inner) if k is not type(None)), inner)
    noun = {bool: "true or false", int: "a whole number", float: "a number"}.get(
        inner, "a section, an object with fields by name")
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
    limits = [f"{sign} {getattr(rule, key)}" for rule in field.metadata
              for key, sign in signs.items() if getattr(rule, key, None) is not None]
    return f"{optional}{noun} {' and '.join(limits)}".strip()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    near += [k for k in known if k.rpartition(".")[2] == name and k not in near]
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    return f"{name}: no such field{hint}"
