"""Class-agnostic region proposals: a two-stage deformable DETR on the SAM2 feature pyramid.

Paper section "[BOX] branch"; the architecture is Groma's (arXiv 2404.13013), whose attention layers transformers has.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrEncoderLayer,
    DeformableDetrMultiscaleDeformableAttention,
    DeformableDetrSinePositionEmbedding,
)
from transformers.utils import ModelOutput

from .box_ops import cxcywh_to_xyxy, non_maximum_suppression, sine_box_embedding
from .configuration_sparrow import RegionProposerConfig
from .losses import HungarianMatcher, proposal_loss
from .modeling_base import SparrowPreTrainedModel


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


@dataclass
class RegionProposerOutput(ModelOutput):
    """Raw output of the proposer for `F` frames; `Q` queries, `S` pyramid cells, `D` = d_model.

    Args:
        hidden_states: `(F, Q, D)` last decoder state of each query, the feature of its proposal.
        boxes: `(layers, F, Q, 4)` normalised cxcywh after each decoder layer.
        objectness: per objectness head `(layers, F, Q)` logits.
        reference_points: `(F, Q, 4)` normalised cxcywh the decoder starts from.
        encoder_objectness: `(F, S)` logits of the first stage.
        encoder_boxes: `(F, S, 4)` logits of normalised cxcywh of the first stage.
        encoder_hidden_states: `(F, S, D)`.
        decoder_hidden_states: `(layers, F, Q, D)`.
    """

    hidden_states: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    objectness: tuple[torch.Tensor, ...] | None = None
    reference_points: torch.Tensor | None = None
    encoder_objectness: torch.Tensor | None = None
    encoder_boxes: torch.Tensor | None = None
    encoder_hidden_states: torch.Tensor | None = None
    decoder_hidden_states: torch.Tensor | None = None


@dataclass
class RegionProposals(ModelOutput):
    """The best proposals of `F` frames, best first.

    Args:
        boxes: `(F, Q, 4)` normalised xyxy, not clamped to the picture.
        scores: `(F, Q)` objectness in [0, 1].
        features: `(F, Q, D)`.
        valid: bool `(F, Q)`; False for proposals that suppression removed.
    """

    boxes: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    features: torch.Tensor | None = None
    valid: torch.Tensor | None = None


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of `(F, C, H, W)`."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BoxHead(nn.Module):
    """Three-layer MLP from a query state to a box offset in logit space."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 4)]
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = nn.functional.relu(layer(hidden_states))
        return self.layers[-1](hidden_states)


class RegionProposer(SparrowPreTrainedModel):
    """`forward(levels)` gives raw boxes and objectness, `propose(levels)` the kept proposals, `loss(…)` trains it.

    Args:
        config: sizes and rules.
        channels: channels of the pyramid levels, finest first; the last `config.num_feature_levels` are used.
    """

    config: RegionProposerConfig
    config_class = RegionProposerConfig
    _no_split_modules = ["DeformableDetrEncoderLayer", "DeformableDetrDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: RegionProposerConfig, channels: list[int]):
        super().__init__(config)
        D, num_levels = config.d_model, config.num_feature_levels
        self.vision_encoder = None
        if config.vision_config is not None:
            self.vision_encoder = AutoModel.from_config(config.vision_config)
            channels = [config.vision_config.fpn_hidden_size] * config.vision_config.num_feature_levels
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, D, kernel_size=1), ChannelLayerNorm(D, eps=1e-6))
            for c in channels[-num_levels:]
        )
        self.position_embedding = DeformableDetrSinePositionEmbedding(D // 2, normalize=True)
        self.level_embedding = nn.Parameter(torch.zeros(num_levels, D))
        self.query_embedding = nn.Embedding(config.num_queries, D)
        self.encoder_layers = nn.ModuleList(DeformableDetrEncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder_layers = nn.ModuleList(DeformableDetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.encoder_output = nn.Linear(D, D)
        self.encoder_output_norm = nn.LayerNorm(D)
        self.position_projection = nn.Linear(2 * D, 2 * D)
        self.position_norm = nn.LayerNorm(2 * D)
        self.encoder_objectness_head = nn.Linear(D, 1)
        self.objectness_heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(D, 1) for _ in range(config.decoder_layers)) for _ in config.objectness_powers
        )
        # the last one serves the encoder stage
        self.box_heads = nn.ModuleList(
            BoxHead(D, config.box_head_hidden_size) for _ in range(config.decoder_layers + 1)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DeformableDetrMultiscaleDeformableAttention):
            _init_deformable_attention(module)
        elif module is self:
            init.normal_(self.level_embedding, std=self.config.initializer_range)
            # rare objects: start the focal loss at a probability of 0.01
            for head in [self.encoder_objectness_head, *(head for heads in self.objectness_heads for head in heads)]:
                init.constant_(head.bias, -math.log(99.0))
            for box_head in self.box_heads:  # start at the anchors
                init.zeros_(box_head.layers[-1].weight)
                init.zeros_(box_head.layers[-1].bias)

    def encode_pictures(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """FPN levels, finest first, from the proposer's own vision encoder; `pixel_values` `(F, 3, H, W)`."""
        return list(self.vision_encoder(pixel_values).fpn_hidden_states)

    def forward(self, levels: list[torch.Tensor]) -> RegionProposerOutput:
        """
        Args:
            levels: pyramid levels `(F, C_l, H_l, W_l)`, finest first; the last `num_feature_levels` are used.
        """
        levels = [
            project(level)
            for project, level in zip(self.input_projections, levels[-len(self.input_projections) :], strict=True)
        ]
        shapes = [tuple(level.shape[-2:]) for level in levels]
        hidden_states = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (F, S, D)
        geometry = {
            "spatial_shapes": torch.tensor(shapes, device=hidden_states.device),
            "spatial_shapes_list": shapes,
            "level_start_index": None,  # only compiled kernels read it
        }
        encoded = self._encode(hidden_states, levels, geometry)
        objectness, box_logits = self._first_stage(encoded, shapes)
        best = objectness.topk(min(self.config.num_queries, objectness.shape[1]), dim=1).indices
        start = box_logits.gather(1, best[..., None].expand(-1, -1, 4)).detach()  # (F, Q, 4) logits
        states, boxes = self._decode(encoded, start, geometry)
        return RegionProposerOutput(
            hidden_states=states[-1],
            boxes=boxes,
            objectness=tuple(
                torch.stack([head(state).squeeze(-1) for head, state in zip(heads, states, strict=True)])
                for heads in self.objectness_heads
            ),
            reference_points=start.sigmoid(),
            encoder_objectness=objectness,
            encoder_boxes=box_logits,
            encoder_hidden_states=encoded,
            decoder_hidden_states=states,
        )

    def _encode(self, hidden_states: torch.Tensor, levels: list[torch.Tensor], geometry: dict) -> torch.Tensor:
        positions = torch.cat(
            [
                self.position_embedding(level.shape, level.device, level.dtype).flatten(2).transpose(1, 2) + embedding
                for level, embedding in zip(levels, self.level_embedding, strict=True)
            ],
            dim=1,
        )
        F = len(hidden_states)
        centers = torch.cat([_cell_centers(*shape, hidden_states) for shape in geometry["spatial_shapes_list"]])
        reference = centers[None, :, None].expand(F, -1, len(levels), -1)  # (F, S, levels, 2)
        hidden_states = nn.functional.dropout(hidden_states, self.config.dropout, self.training)
        for layer in self.encoder_layers:
            hidden_states = layer(
                hidden_states, None, spatial_position_embeddings=positions, reference_points=reference, **geometry
            )
        return hidden_states

    def _first_stage(self, encoded: torch.Tensor, shapes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Objectness `(F, S)` and box logits `(F, S, 4)` of a small square box at each cell."""
        anchors = torch.cat(
            [
                torch.cat(
                    [_cell_centers(*shape, encoded), encoded.new_full((shape[0] * shape[1], 2), 0.05 * 2**level)], -1
                )
                for level, shape in enumerate(shapes)
            ]
        )
        inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
        anchor_logits = torch.log(anchors / (1 - anchors)).masked_fill(~inside, float("inf"))
        output = self.encoder_output_norm(self.encoder_output(encoded.masked_fill(~inside, 0.0)))
        return self.encoder_objectness_head(output).squeeze(-1), self.box_heads[-1](output) + anchor_logits

    def _decode(self, encoded: torch.Tensor, start: torch.Tensor, geometry: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder states `(layers, F, Q, D)` and boxes `(layers, F, Q, 4)`, normalised cxcywh."""
        F, Q = start.shape[:2]
        positions = self.position_projection(sine_box_embedding(start.sigmoid(), self.config.d_model // 2))
        positions = self.position_norm(positions)[..., : self.config.d_model]
        hidden_states = self.query_embedding.weight[:Q].expand(F, -1, -1)
        initial = reference = base = start.sigmoid()
        states, boxes = [], []
        for layer, box_head in zip(self.decoder_layers, self.box_heads[:-1], strict=True):
            hidden_states = layer(
                hidden_states,
                object_queries_position_embeddings=positions,
                reference_points=reference[:, :, None].expand(-1, -1, len(geometry["spatial_shapes_list"]), -1),
                encoder_hidden_states=encoded,
                **geometry,
            )
            offset = box_head(hidden_states)
            states.append(hidden_states)
            boxes.append((offset + inverse_sigmoid(base)).sigmoid())
            if self.config.refine_reference_points:
                reference = base = boxes[-1].detach()
            else:  # released rule: the next box starts from this offset measured at the initial reference
                base = (offset + inverse_sigmoid(initial)).sigmoid()
        return torch.stack(states), torch.stack(boxes)

    def propose(self, levels: list[torch.Tensor]) -> RegionProposals:
        """The `max_proposals` best proposals of each frame; those that suppression removed come last, not valid."""
        return self.select(self(levels))

    def select(self, output: RegionProposerOutput) -> RegionProposals:
        """Merge the objectness heads, keep the best `max_proposals`, suppress duplicates."""
        scores = torch.ones_like(output.objectness[0][-1])
        for logits, power in zip(output.objectness, self.config.objectness_powers, strict=True):
            scores = scores * logits[-1].sigmoid() ** power
        boxes = cxcywh_to_xyxy(output.boxes[-1])
        valid = torch.ones_like(scores, dtype=torch.bool)
        if self.config.nms_threshold is not None:
            for frame in range(len(scores)):
                keep = non_maximum_suppression(
                    boxes[frame].detach(), scores[frame].detach(), self.config.nms_threshold
                )
                valid[frame] = torch.zeros_like(valid[frame]).index_fill(0, keep, True)
        ranked = torch.where(valid, scores, scores - 2)  # scores are in [0, 1]: removed ones go last
        best = ranked.topk(min(self.config.max_proposals, scores.shape[1]), dim=1).indices
        return RegionProposals(
            boxes=boxes.gather(1, best[..., None].expand(-1, -1, 4)),
            scores=scores.gather(1, best),
            features=output.hidden_states.gather(1, best[..., None].expand(-1, -1, output.hidden_states.shape[-1])),
            valid=valid.gather(1, best),
        )

    def loss(
        self, output: RegionProposerOutput, targets: list[torch.Tensor], objectness_index: int = 0
    ) -> dict[str, torch.Tensor]:
        """Detection losses of every decoder layer and of the encoder stage, and their weighted sum.

        Args:
            output: of `forward`.
            targets: per frame `(N, 4)` ground-truth boxes, normalised cxcywh.
            objectness_index: which objectness head the source of this batch trains.

        Returns:
            `loss`, and unweighted `loss_ce`, `loss_bbox`, `loss_giou`, with suffix `_k` for earlier layers and `_enc`
            for the encoder stage.
        """
        config = self.config
        matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost, config.focal_alpha)
        logits = output.objectness[objectness_index]
        stages = {"": (logits[-1], output.boxes[-1])}
        stages |= {f"_{k}": (logits[k], output.boxes[k]) for k in range(len(logits) - 1)}
        stages["_enc"] = (output.encoder_objectness, output.encoder_boxes.sigmoid())
        losses = {}
        for suffix, (stage_logits, stage_boxes) in stages.items():
            stage = proposal_loss(stage_logits, stage_boxes, targets, matcher)
            losses |= {name + suffix: value for name, value in stage.items()}
        weights = {
            "loss_ce": config.class_loss_weight,
            "loss_bbox": config.bbox_loss_weight,
            "loss_giou": config.giou_loss_weight,
        }
        total = sum(weight * losses[name + suffix] for suffix in stages for name, weight in weights.items())
        return {"loss": total, **losses}


def _cell_centers(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Normalised (x, y) centres of a feature grid, row by row, `(height * width, 2)`."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)


def _init_deformable_attention(module: DeformableDetrMultiscaleDeformableAttention):
    """Sampling points start on rays around the reference point, one direction per head (arXiv 2010.04159)."""
    angle = torch.arange(module.n_heads, dtype=torch.float32) * (2 * math.pi / module.n_heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    radius = torch.arange(1, module.n_points + 1, dtype=torch.float32)
    offsets = direction[:, None, None] * radius[None, None, :, None]  # (heads, 1, points, 2)
    init.zeros_(module.sampling_offsets.weight)
    init.copy_(module.sampling_offsets.bias, offsets.expand(-1, module.n_levels, -1, -1).flatten())
    init.zeros_(module.attention_weights.weight)
    init.zeros_(module.attention_weights.bias)
    for projection in (module.value_proj, module.output_proj):
        init.xavier_uniform_(projection.weight)
        init.zeros_(projection.bias)
