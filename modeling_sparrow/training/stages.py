"""The training stages of SPARROW: their settings, and what each trains on what.

- `proposer`, stage 0 (class-agnostic proposer pre-training): the region proposer, by focal, L1 and GIoU loss.
- `target_injection`, stage 1 (target-specific information injection): LoRA on the language model, the rows of the new
  tokens, V->L adapters and [SEG] head, by the words of the answer and mask BCE and Dice.
- `filter`, stage 2 (task adaptation, filter-only fine-tuning): filtration head and [BOX] head, by the class and the
  box loss of the filter.

Each is one YAML file; `lora: null` with other `trainable` parts makes the second one a full fine-tuning.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from sparrow_processing.synthetic import MAX_SAMPLED

from .lora import LoraSettings
from .pictures import CocoPictures, SyntheticPictures
from .records import RecordFile, SyntheticRecords
from .samples import FrameSettings, TrackedFeatureSettings
from .settings import SettingsError


@dataclass(kw_only=True)
class Optimization:
    """AdamW and how it is run.

    Args:
        steps: of the optimizer.
        batch_size: samples per process and micro-batch; a sample is a video with its questions, or a picture.
        accumulation: micro-batches of a step.
        schedule: of the learning rate after the warm-up.
        precision: of the computation; `bfloat16` is autocast, what is trained stays float32.
        gradient_checkpointing: computes activations twice instead of keeping them.
        num_workers: processes that prepare samples.
        save_every, log_every: steps.
        keep_checkpoints: how many of the newest.
    """

    steps: int
    learning_rate: float
    batch_size: int = 1
    accumulation: int = 1
    warmup_steps: int = 100
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    num_workers: int = 0
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.accumulation, self.log_every, self.save_every) < 1:
            raise SettingsError("steps, batch_size, accumulation, log_every and save_every must be at least 1.")
        if len(self.betas) != 2:
            raise SettingsError(f"betas: expected two numbers, got {self.betas}.")


# ---------------------------------------------------------------------- data


@dataclass(kw_only=True)
class RecordsSource:
    """Records of a file or data set, see [`RecordFile`]."""

    kind: Literal["records"]
    path: str
    split: str = "train"
    questions_per_video: int = 1
    weight: float = 1.0

    def open_records(self, num_frames: int) -> RecordFile:
        """The records, whatever `num_frames` the language model sees of a video: their answers are as written."""
        return RecordFile(self.path, self.split, self.questions_per_video)


@dataclass(kw_only=True)
class SyntheticSource:
    """The generated world, see [`SyntheticRecords`]."""

    kind: Literal["synthetic"]
    split: str = "train"
    preset: str = "train"
    world: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    size: int = 1_000_000
    questions_per_video: int = 4
    kinds: list[str] | None = None
    weight: float = 1.0

    def open_records(self, num_frames: int) -> SyntheticRecords:
        """Records whose time spans count in the `num_frames` that the language model sees of a video."""
        world = (self.split, self.preset, self.world, self.seed, self.size)
        sampled = min(num_frames, MAX_SAMPLED)
        return SyntheticRecords(*world, self.questions_per_video, self.kinds, sampled)

    def open_pictures(self) -> SyntheticPictures:
        return SyntheticPictures(self.split, self.preset, self.world, self.seed, self.size)


@dataclass(kw_only=True)
class CocoSource:
    """Pictures with boxes, see [`CocoPictures`]."""

    kind: Literal["coco"]
    annotations: str
    images: str
    weight: float = 1.0

    def open_pictures(self) -> CocoPictures:
        return CocoPictures(self.annotations, self.images)


@dataclass(kw_only=True)
class HeldOutPictures:
    """Pictures to evaluate on; `samples` of them every `every` steps."""

    data: list[CocoSource | SyntheticSource]
    samples: int = 64
    every: int = 500


@dataclass(kw_only=True)
class HeldOutRecords:
    """Records to evaluate on; `samples` of them every `every` steps."""

    data: list[RecordsSource | SyntheticSource]
    samples: int = 64
    every: int = 500


@dataclass(kw_only=True)
class SyntheticFigures:
    """Figures of `sparrow evaluate synthetic` on a few clips, whenever held-out losses are computed."""

    split: str = "validation"
    clips: int = 16
    seed: int = 0
    max_new_tokens: int = 32


# ---------------------------------------------------------------------- stages


@dataclass(kw_only=True)
class StageSettings:
    """What all stages share.

    Args:
        model: folder or Hub id the stage starts from, also the output of an earlier stage; None: sparrow-tiny.
        output: folder for checkpoints, logs, and `final`, which is what the stage gives.
        dtype: of the frozen weights.
    """

    output: str
    optimization: Optimization
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.dtype != "float32" and self.optimization.precision != self.dtype:
            raise SettingsError(f"dtype: {self.dtype} needs optimization.precision: {self.dtype}.")


@dataclass(kw_only=True)
class ProposerStage(StageSettings):
    """Stage 0: the region proposer on a frozen SAM2 encoder.

    Args:
        augment: flip and crop the pictures.
        offset_learning_rate: factor of the learning rate for sampling offsets and reference points (arXiv 2010.04159).
    """

    stage: Literal["proposer"]
    data: list[CocoSource | SyntheticSource]
    augment: bool = True
    offset_learning_rate: float = 0.1
    held_out: HeldOutPictures | None = None


@dataclass(kw_only=True)
class LossWeights:
    """Weights of the losses; one of weight 0 is not computed."""

    ce: float = 0.0
    mask_bce: float = 0.0
    mask_dice: float = 0.0
    filter_class: float = 0.0
    filter_box: float = 0.0

    def by_name(self) -> dict[str, float]:
        """As `forward` takes them."""
        return {f"{name}_loss": weight for name, weight in vars(self).items() if weight}


@dataclass(kw_only=True)
class GroundingStage(StageSettings):
    """What the stages on questions share.

    Args:
        trainable: parts of the model that are trained in full, as `SparrowModel` names them.
        losses: their weights.
        box_guidance: whether the boxes that [BOX] chooses prompt the masks; filter losses need it.
        frames, tracked_features: what a sample shows.
        figures: of the generated world, while training.
    """

    data: list[RecordsSource | SyntheticSource]
    trainable: list[str]
    losses: LossWeights
    box_guidance: bool
    frames: FrameSettings = field(default_factory=FrameSettings)
    tracked_features: TrackedFeatureSettings = field(default_factory=TrackedFeatureSettings)
    held_out: HeldOutRecords | None = None
    figures: SyntheticFigures | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.losses.by_name():
            raise SettingsError("losses: all weights are 0, there is nothing to train.")
        if (self.losses.filter_class or self.losses.filter_box) and not self.box_guidance:
            raise SettingsError("losses: those of the filter need box_guidance: true.")
        if self.figures is not None and self.held_out is None:
            raise SettingsError("figures: are computed with the held-out losses; give held_out as well.")


@dataclass(kw_only=True)
class TargetInjectionStage(GroundingStage):
    """Stage 1: target-specific information injection; without `lora` a full fine-tuning of `trainable`."""

    stage: Literal["target_injection"]
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    trainable: list[str] = field(default_factory=lambda: ["host.spatial_adapter", "host.temporal_adapter", "seg_head"])
    losses: LossWeights = field(default_factory=lambda: LossWeights(ce=1.0, mask_bce=2.0, mask_dice=0.5))
    box_guidance: bool = False
    tracked_features: TrackedFeatureSettings = field(default_factory=lambda: TrackedFeatureSettings(mode="train"))


@dataclass(kw_only=True)
class FilterStage(GroundingStage):
    """Stage 2: filter-only fine-tuning.

    Args:
        allow_untrained_start: start from a model that has not been through stage 1.
    """

    stage: Literal["filter"]
    trainable: list[str] = field(default_factory=lambda: ["filtration_head", "box_head"])
    losses: LossWeights = field(default_factory=lambda: LossWeights(filter_class=1.0, filter_box=2.0))
    box_guidance: bool = True
    allow_untrained_start: bool = False


AnyStage = ProposerStage | TargetInjectionStage | FilterStage
