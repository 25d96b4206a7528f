"""Configuration of SPARROW: one top-level config and one per part.

Defaults are the paper's (arXiv 2603.12382) on the VideoGLaMM host. Options marked *released* exist because released
checkpoints were trained with another behaviour; `SparrowConfig.released()` sets all of them.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# What transformers itself writes into a config.json or passes along, beside the fields of a config.
_TRANSFORMERS_KEYS = {
    "auto_map", "custom_pipelines", "transformers_version", "model_type", "torch_dtype", "name_or_path", "num_labels",
    "attn_implementation", "experts_implementation", "output_attentions", "quantization_config", "per_layer_config",
}  # fmt: skip


@strict
class SparrowBaseConfig(PreTrainedConfig):
    """Refuses fields it does not know, so that a mistyped option does not pass in silence."""

    def __post_init__(self, **kwargs):
        known = _TRANSFORMERS_KEYS | set(GenerationConfig._get_default_generation_params())
        unknown = sorted(key for key in kwargs if key not in known and not key.startswith("_"))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no field {', '.join(unknown)}.")
        super().__post_init__(**kwargs)


@strict
class InternVideo2Config(SparrowBaseConfig):
    r"""
    Temporal tower: the vision encoder of InternVideo2 stage 2.

    Args:
        image_size (`int`): side of the square input, pixels.
        patch_size (`int`): side of a patch, pixels.
        num_frames (`int`): frames of one chunk, encoded jointly.
        tubelet_size (`int`): frames merged by the patch embedding; divides `num_frames`.
        num_hidden_layers (`int`): layers that run. The original has 40 and SPARROW reads the output of the 39th.
        layer_scale_init_value (`float`): initial residual scale.
    """

    model_type = "sparrow_internvideo2"
    base_config_key = "temporal_config"

    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    num_frames: int = 4
    tubelet_size: int = 1
    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    rms_norm_eps: float = 1e-6
    layer_scale_init_value: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self):
        if self.num_frames % self.tubelet_size:
            raise ValueError(f"tubelet_size {self.tubelet_size} must divide num_frames {self.num_frames}.")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} must divide image_size {self.image_size}.")


@strict
class RegionProposerConfig(SparrowBaseConfig):
    r"""
    Class-agnostic two-stage deformable DETR on the SAM2 feature pyramid.

    Args:
        num_feature_levels (`int`): pyramid levels used, counted from the coarsest: 2 are strides 8 and 16.
            *Released*: 1.
        num_queries (`int`): proposals per picture.
        box_head_hidden_size (`int`): width of the box MLPs. *Released*: 256, whatever `d_model` is.
        objectness_powers (`list[float]`): one objectness head per entry, merged as the product of
            `sigmoid(logit) ** power`. *Released*: `[0.3, 0.7]`, a head for detection data and one for SA-1B.
        refine_reference_points (`bool`): each decoder layer attends around the boxes of the layer before.
            *Released*: `False`, the official line that does so is commented out.
        nms_threshold (`float`, *optional*): IoU above which the worse of two proposals is dropped. *Released*: `None`.
        max_proposals (`int`): best proposals kept. *Released*: 100.
        image_size (`int`, *optional*): side at which a picture is encoded for the proposer alone; `None` shares the
            pyramid of the mask tracker. *Released*: 448.
        vision_config (`dict`, *optional*): SAM2 vision encoder of the proposer's own. *Released*: the detector
            checkpoint has one; `None` shares the encoder of the mask tracker.
        class_cost, bbox_cost, giou_cost: costs of the Hungarian matching.
        class_loss_weight, bbox_loss_weight, giou_loss_weight, focal_alpha: weights of its losses.
    """

    model_type = "sparrow_region_proposer"
    base_config_key = "proposer_config"
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="sam2_vision_model", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    d_model: int = 256
    encoder_layers: int = 6
    encoder_ffn_dim: int = 1024
    encoder_attention_heads: int = 8
    encoder_n_points: int = 4
    decoder_layers: int = 6
    decoder_ffn_dim: int = 1024
    decoder_attention_heads: int = 8
    decoder_n_points: int = 4
    num_feature_levels: int = 2
    num_queries: int = 300
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    disable_custom_kernels: bool = True
    box_head_hidden_size: int = 256
    objectness_powers: list[float] | None = None
    refine_reference_points: bool = True
    nms_threshold: float | None = 0.7
    max_proposals: int = 100
    image_size: int | None = None
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_weight: float | int = 2
    bbox_loss_weight: float | int = 5
    giou_loss_weight: float | int = 2
    focal_alpha: float = 0.25
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.objectness_powers = [1.0] if self.objectness_powers is None else self.objectness_powers
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        if not 1 <= self.num_feature_levels <= 3:
            raise ValueError(
                f"num_feature_levels must be 1, 2 or 3 (SAM2 has three levels), got {self.num_feature_levels}."
            )
        if self.vision_config is not None and self.image_size is None:
            raise ValueError("A proposer with its own vision_config needs image_size, the side it is encoded at.")


@strict
class FiltrationHeadConfig(SparrowBaseConfig):
    r"""
    Language-conditioned choice among the proposals.

    Args:
        variant (`str`): `"paper"`: attention of the [BOX] query over ROI tokens, keep score, box refinement.
            *Released*: `"released"`, a dot product with the proposer's query features plus a gated ROI score, no
            refinement.
        hidden_size (`int`): width of the head. The released ROI scorer has its own: `roi_hidden_size`.
        roi_size (`int`): bins per side of ROIAlign.
        roi_sampling_ratio (`int`): samples per bin and axis, 0 for adaptive. *Released*: 0.
        score_threshold (`float`): proposals with at least this confidence are kept; if none passes, the best one,
            provided it reaches `fallback_threshold`. *Released*: 0.4.
        fallback_threshold (`float`): least confidence of a sole best proposal; below it nothing is grounded.
            *Released*: 0, there is always a box.
        max_boxes_per_token (`int`): most boxes one [BOX] may select. *Released*: 16, 100 in training.
        nms_threshold (`float`, *optional*): IoU above which the worse of two selected boxes is dropped.
            *Released*: `None`.
        num_refined (`int`): the best `M` proposals get a refined box (paper variant).
        objectness_power (`float`): final confidence = keep score x objectness ** power (paper variant; the paper
            fuses the two without giving the formula).
        dot_product_score (`bool`): adds a scaled dot product of the [BOX] query with the region to the keep score
            (paper variant). Learns about five times faster from little data; sparrow-tiny has it.
        plural_head (`bool`): tells from the [BOX] embedding whether it means one object or several (paper variant; the
            paper has one threshold for both). One: the best proposal is kept. Several: all with at least
            `plural_threshold`, on the candidate frame that shows most of them. sparrow-tiny has it.
        plural_threshold (`float`): least confidence of a proposal kept for a [BOX] that means several objects.
        completion_iou (`float`, *optional*): of a [BOX] that means several objects, boxes on the other candidate
            frames that overlap no followed mask by more than this IoU are followed too: what was hidden, or had not
            yet come, on the frame that was prompted first. `None`: the objects of one frame alone.
        positive_iou, negative_iou (`float`): a proposal is a positive above the first, a negative below the second,
            ignored between. *Released*: 0.3 and 0.3.
        roi_gate_init (`float`): initial weight of the ROI score, clamped to [0, 1] at use (released variant).
        box_regression (`bool`): the released variant has a box branch that only feeds a loss.
        prior_min_score, prior_max_keep: *released*: selected boxes are decoded to masks and kept by how well mask and
            box agree (at least `prior_min_score`, at most `prior_max_keep`); `None` switches that off.
    """

    model_type = "sparrow_filtration_head"
    base_config_key = "filtration_config"

    variant: Literal["paper", "released"] = "paper"
    hidden_size: int = 256
    roi_size: int = 7
    roi_sampling_ratio: int = 2
    score_threshold: float = 0.5
    fallback_threshold: float = 0.0
    max_boxes_per_token: int = 16
    nms_threshold: float | None = 0.7
    num_refined: int = 16
    objectness_power: float = 0.25
    dot_product_score: bool = False
    plural_head: bool = False
    plural_threshold: float = 0.3
    completion_iou: float | None = None
    positive_iou: float = 0.5
    negative_iou: float = 0.2
    roi_hidden_size: int = 256
    roi_gate_init: float = 0.1
    box_regression: bool = False
    prior_min_score: float | None = None
    prior_max_keep: int = 4
    initializer_range: float = 0.02

    def validate_architecture(self):
        if self.variant == "paper" and self.hidden_size % 8:
            raise ValueError(f"hidden_size must be a multiple of 8, for the box embedding, got {self.hidden_size}.")
        if self.completion_iou is not None and not self.plural_head:
            raise ValueError("completion_iou is for a [BOX] that means several objects: it needs plural_head=True.")


@strict
class MaskTrackerConfig(SparrowBaseConfig):
    r"""
    SAM2 over a video, prompted with boxes and the [SEG] embedding.

    Args:
        sam2_config (`dict` or `Sam2VideoConfig`): the segmenter; its `num_maskmem`,
            `max_object_pointers_in_encoder` and `max_cond_frame_num` bound the memory of an object whatever the
            length of the video.
        propagation (`str`): `"memory"`: prompt one frame and carry the mask on, each box an object of its own.
            *Released*: `"framewise"`, every frame decoded alone with the same boxes and [SEG] embedding, several
            boxes of a token giving one mask, the maximum of their logits.
        joint_prompt (`bool`): corners and [SEG] embedding prompt the decoder together. *Released* video branch:
            `False`, first [SEG], then each box over the mask so far.
        num_padding_points (`int`): empty points before the [SEG] embedding when there is no box. *Released* video
            branch: 2.
        memory_dtype (`str`, *optional*): memory is rounded to this dtype; `None` keeps it. *Released*: `"bfloat16"`.
        binarize_prompted_memory (`bool`): the mask of a prompted frame enters memory as 0 or 1. *Released*: `True`.
        mask_threshold (`float`): logit above which a pixel is foreground.
        visibility_threshold (`float`): object score logit above which an object is visible in a frame.
        reprompt_threshold (`float`, *optional*): when the score of a frame falls below, the frame is located and
            prompted again from the [BOX] and [SEG] embeddings; `None` switches that off.
        max_cached_frames (`int`): pyramids kept to spare encoding a frame twice. One costs about
            `1.3 * image_size ** 2 * fpn_hidden_size / 64` numbers.
        frame_batch_size (`int`): frames encoded at once.
        object_batch_size (`int`): objects decoded at once.
    """

    model_type = "sparrow_mask_tracker"
    base_config_key = "mask_tracker_config"
    sub_configs_defaults = {  # noqa: RUF012
        "sam2_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="sam2_video",
            init_kwargs={
                "vision_config": {
                    "model_type": "sam2_vision_model",
                    "backbone_config": {
                        "model_type": "sam2_hiera_det_model",
                        "hidden_size": 144,
                        "num_attention_heads": 2,
                        "blocks_per_stage": [2, 6, 36, 4],
                        "embed_dim_per_stage": [144, 288, 576, 1152],
                        "num_attention_heads_per_stage": [2, 4, 8, 16],
                        "window_size_per_stage": [8, 4, 16, 8],
                        "global_attention_blocks": [23, 33, 43],
                    },
                    "backbone_channel_list": [1152, 576, 288, 144],
                },
                "enable_temporal_pos_encoding_for_object_pointers": False,
                "enable_occlusion_spatial_embedding": False,
            },
        ),
    }

    sam2_config: dict | PreTrainedConfig | None = None
    propagation: Literal["memory", "framewise"] = "memory"
    joint_prompt: bool = True
    num_padding_points: int = 0
    memory_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    binarize_prompted_memory: bool = False
    mask_threshold: float = 0.0
    visibility_threshold: float = 0.0
    reprompt_threshold: float | None = None
    max_cached_frames: int = 16
    frame_batch_size: int = 4
    object_batch_size: int = 16
    initializer_range: float = 0.02

    def validate_architecture(self):
        if self.max_cached_frames < 1 or self.frame_batch_size < 1 or self.object_batch_size < 1:
            raise ValueError("max_cached_frames, frame_batch_size and object_batch_size must be at least 1.")
        if self.propagation == "framewise" and self.reprompt_threshold is not None:
            raise ValueError("reprompt_threshold needs propagation='memory': framewise decoding prompts every frame.")

    @property
    def hidden_size(self) -> int:
        """Width of the prompt embeddings, `D` of [BOX] and [SEG]."""
        return self.sam2_config.vision_config.fpn_hidden_size

    @property
    def image_size(self) -> int:
        """Side of the square frames SAM2 sees, pixels."""
        return self.sam2_config.image_size

    @property
    def pyramid_channels(self) -> list[int]:
        """Channels of the three levels shared by proposer, filtration head and mask decoder, finest first."""
        return [self.hidden_size // 8, self.hidden_size // 4, self.hidden_size]


@strict
class SparrowConfig(SparrowBaseConfig):
    r"""
    Configuration of [`SparrowForVideoGrounding`].

    Args:
        spatial_config: spatial tower, a CLIP vision model.
        temporal_config ([`InternVideo2Config`]): temporal tower.
        text_config: any causal language model of transformers. Phi-3-mini for released weights.
        mask_tracker_config ([`MaskTrackerConfig`]), proposer_config ([`RegionProposerConfig`]),
            filtration_config ([`FiltrationHeadConfig`]): the pixel side.
        num_frames (`int`): frames of a clip the language model sees.
        num_prompt_frames (`int`): of these, how many are searched for the best frame to prompt. 1: the first frame.
        spatial_feature_layer (`int`): hidden state of the spatial tower that is used.
        spatial_pool_size, temporal_pool_size (`int`): tokens per side and frame after pooling. A still picture is not
            pooled.
        box_token_id, seg_token_id (`int`): `[BOX]` and `[SEG]`.
        video_token_id, tsf_token_id (`int`): placeholders that visual features and tracked features replace. They may
            lie beyond the vocabulary.
        shared_token_head (`bool`): one language-to-vision head for both tokens. *Released*: `True`.
        box_guidance (`bool`): boxes chosen by [BOX] prompt the mask. `False` gives the host without SPARROW's boxes.
        tsf_num_clusters, tsf_iterations (`int`): `K` and rounds of K-means over tracked features.
        max_training_tokens (`int`, *optional*): of each kind, tokens of a video that `forward` grounds. *Released*: 4.
        ce_loss_weight, mask_bce_loss_weight, mask_dice_loss_weight, filter_class_loss_weight, filter_box_loss_weight
            (`float`): weights of the losses of `forward`.
    """

    model_type = "sparrow"
    sub_configs_defaults = {  # noqa: RUF012
        "spatial_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        ),
        "temporal_config": InternVideo2Config,
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="phi3", init_kwargs={"sliding_window": 2047, "vocab_size": 32064}
        ),
        "mask_tracker_config": MaskTrackerConfig,
        "proposer_config": RegionProposerConfig,
        "filtration_config": FiltrationHeadConfig,
    }

    spatial_config: dict | PreTrainedConfig | None = None
    temporal_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    mask_tracker_config: dict | PreTrainedConfig | None = None
    proposer_config: dict | PreTrainedConfig | None = None
    filtration_config: dict | PreTrainedConfig | None = None

    num_frames: int = 16
    num_prompt_frames: int = 4
    spatial_feature_layer: int = -2
    spatial_pool_size: int = 12
    temporal_pool_size: int = 8
    seg_token_id: int = 32011
    box_token_id: int = 32012
    video_token_id: int = 32064
    tsf_token_id: int = 32065
    shared_token_head: bool = False
    box_guidance: bool = True
    tsf_num_clusters: int = 4
    tsf_iterations: int = 8
    max_training_tokens: int | None = None
    ce_loss_weight: float = 1.0
    mask_bce_loss_weight: float = 2.0
    mask_dice_loss_weight: float = 0.5
    filter_class_loss_weight: float = 1.0
    filter_box_loss_weight: float = 2.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    def validate_architecture(self):
        special = {
            name: getattr(self, name) for name in ("box_token_id", "seg_token_id", "video_token_id", "tsf_token_id")
        }
        if len(set(special.values())) < len(special):
            raise ValueError(f"Special token ids must differ from each other, got {special}.")
        chunk = self.temporal_config.num_frames
        if self.num_frames % chunk:
            raise ValueError(
                f"num_frames {self.num_frames} must be a multiple of the temporal tower's chunk of {chunk} frames."
            )
        if not 1 <= self.num_prompt_frames <= self.num_frames:
            raise ValueError(f"num_prompt_frames must lie in 1 … num_frames = {self.num_frames}.")
        if self.filtration_config.completion_iou is not None and self.mask_tracker_config.propagation == "framewise":
            raise ValueError("completion_iou adds objects to those that memory follows: not with framewise masks.")

    @property
    def prompt_size(self) -> int:
        """Width of the [BOX] and [SEG] embeddings: the prompt space of the mask decoder."""
        return self.mask_tracker_config.hidden_size

    def num_visual_tokens(self, num_frames: int) -> int:
        """Visual tokens of a clip of `num_frames` sampled frames; one frame counts as a still picture.

        Frames are padded to whole chunks of the temporal tower by repeating the last one.
        """
        spatial_side = self.spatial_config.image_size // self.spatial_config.patch_size
        if num_frames == 1:
            return spatial_side**2
        chunk = self.temporal_config.num_frames
        num_frames = -(-num_frames // chunk) * chunk
        temporal_steps = num_frames // self.temporal_config.tubelet_size
        return num_frames * self.spatial_pool_size**2 + temporal_steps * self.temporal_pool_size**2
