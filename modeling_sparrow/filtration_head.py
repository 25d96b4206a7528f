"""The choice among region proposals by the [BOX] embedding.

`FiltrationHead` is the paper's (section "[BOX] branch"), `ReleasedFiltrationHead` what released checkpoints contain.
Both take the [BOX] embeddings of one video, the proposals of some of its frames and the shared SAM2 pyramid.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .box_ops import (
    cxcywh_to_xyxy,
    non_maximum_suppression,
    roi_align,
    sine_box_embedding,
    xyxy_to_cxcywh,
)
from .configuration_sparrow import FiltrationHeadConfig
from .modeling_base import SparrowPreTrainedModel
from .region_proposer import RegionProposals


@dataclass
class FiltrationOutput(ModelOutput):
    """Scores of `S` [BOX] embeddings over `Q` proposals in each of `F` frames.

    Args:
        logits: `(S, F, Q)` keep score, -inf where the proposal is not valid.
        confidence: `(S, F, Q)` in [0, 1], keep score and objectness together.
        boxes: `(S, F, Q, 4)` normalised xyxy, refined where the head refines.
        regressed_boxes: `(S, F, Q, 4)` normalised xyxy of the box branch, for its loss; `None` without one.
        tokens: `(S, D)` embeddings after attending to the proposals (released variant).
        attention: `(S, Q)` of that attention (released variant).
        plural_logits: `(S,)` of a [BOX] meaning several objects; `None` without a plural head.
    """

    logits: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    regressed_boxes: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    plural_logits: torch.Tensor | None = None


def pool_regions(levels: list[torch.Tensor], boxes: torch.Tensor, config: FiltrationHeadConfig) -> list[torch.Tensor]:
    """ROIAlign of boxes `(F, Q, 4)`, normalised xyxy, on every level `(F, C_l, H_l, W_l)`: `(F, Q, C_l, P, P)` each.

    Pictures are square, so the height of a level gives the scale of both axes.
    """
    return [
        roi_align(level, boxes, config.roi_size, scale=level.shape[-2], sampling_ratio=config.roi_sampling_ratio)
        for level in levels
    ]


class FiltrationHead(SparrowPreTrainedModel):
    """Paper variant. For a proposal with ROI tokens `F_i`, pooled region `G_i` and a [BOX] embedding `e`:

        Z_i   = softmax((W_q e)(W_k F_i)^T / sqrt(d)) W_v F_i
        s_i   = W_2 relu(W_1 [Z_i; G_i; e])              keep score (logit)
        b^_i  = b_i shifted and scaled by f([Z_i; G_i; e])   refinement, for the best M

    Region tokens know their cell and level, the pooled region knows where its box lies: without that, words of
    position could not be grounded.

    Args:
        config: sizes and rules.
        prompt_size: width `D` of the [BOX] embedding.
        channels: channels of the pyramid levels, finest first.
    """

    config: FiltrationHeadConfig
    config_class = FiltrationHeadConfig

    def __init__(self, config: FiltrationHeadConfig, prompt_size: int, channels: list[int]):
        super().__init__(config)
        hidden = config.hidden_size
        self.level_projections = nn.ModuleList(nn.Linear(c, hidden) for c in channels)
        self.cell_embedding = nn.Parameter(torch.zeros(len(channels), config.roi_size**2, hidden))
        self.token_norm = nn.LayerNorm(hidden)
        self.region_projection = nn.Linear(hidden, hidden)
        self.region_norm = nn.LayerNorm(hidden)
        self.position_projection = nn.Linear(hidden, hidden)
        self.text_projection = nn.Linear(prompt_size, hidden)
        self.query_projection = nn.Linear(prompt_size, hidden)
        self.key_projection = nn.Linear(hidden, hidden)
        self.value_projection = nn.Linear(hidden, hidden)
        self.score_head = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.refinement_head = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4))
        if config.dot_product_score:
            self.dot_query = nn.Linear(prompt_size, hidden)
            self.dot_key = nn.Linear(hidden, hidden)
            self.dot_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.plural_head = None
        if config.plural_head:
            self.plural_head = nn.Sequential(nn.Linear(prompt_size, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.normal_(self.cell_embedding, std=self.config.initializer_range)
            init.zeros_(self.refinement_head[-1].weight)
            init.zeros_(self.refinement_head[-1].bias)
            if self.config.dot_product_score:
                init.constant_(self.dot_scale, math.log(10.0))
            if self.config.plural_head:  # one object, until it has learnt better
                init.zeros_(self.plural_head[-1].weight)
                init.zeros_(self.plural_head[-1].bias)

    def forward(
        self, tokens: torch.Tensor, proposals: RegionProposals, levels: list[torch.Tensor]
    ) -> FiltrationOutput:
        """
        Args:
            tokens: `(S, D)` [BOX] embeddings of one video.
            proposals: of `F` frames of it.
            levels: pyramid of these frames, `(F, C_l, H_l, W_l)`, finest first.
        """
        regions, region_tokens = self.encode_regions(proposals.boxes, levels)
        logits, offsets = self.score(tokens, regions, region_tokens)
        logits = logits.masked_fill(~proposals.valid, float("-inf"))
        confidence = logits.sigmoid() * proposals.scores**self.config.objectness_power
        refined = apply_box_offsets(proposals.boxes, offsets)
        best = confidence.topk(min(self.config.num_refined, confidence.shape[-1]), dim=-1).indices
        is_best = torch.zeros_like(confidence, dtype=torch.bool).scatter(-1, best, True)
        boxes = torch.where(is_best[..., None], refined, proposals.boxes).clamp(0, 1)
        return FiltrationOutput(
            logits=logits,
            confidence=confidence,
            boxes=boxes,
            regressed_boxes=refined,
            plural_logits=self.plural_logits(tokens),
        )

    def plural_logits(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits `(S,)` of [BOX] embeddings `(S, D)` meaning several objects; None without such a head."""
        return None if self.plural_head is None else self.plural_head(tokens).squeeze(-1)

    def encode_regions(self, boxes: torch.Tensor, levels: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled regions `G` `(F, Q, d)` and their ROI tokens `(F, Q, K, d)`, `K` cells of all levels together."""
        pooled = pool_regions(levels, boxes, self.config)
        region_tokens = torch.cat(
            [
                project(region.flatten(3).transpose(2, 3)) + cells
                for project, region, cells in zip(self.level_projections, pooled, self.cell_embedding, strict=True)
            ],
            dim=2,
        )
        region_tokens = self.token_norm(region_tokens)
        # normalised, or what an object looks like would drown where it is
        regions = self.region_norm(nn.functional.gelu(self.region_projection(region_tokens)).mean(dim=2))
        positions = sine_box_embedding(xyxy_to_cxcywh(boxes), self.config.hidden_size // 4)
        return regions + self.position_projection(positions.to(regions.dtype)), region_tokens

    def score(
        self, tokens: torch.Tensor, regions: torch.Tensor, region_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep-score logits `(S, F, Q)` and box offsets `(S, F, Q, 4)`."""
        query = self.query_projection(tokens) / math.sqrt(self.config.hidden_size)
        attention = torch.einsum("sd,fqkd->sfqk", query, self.key_projection(region_tokens)).softmax(-1)
        attended = torch.einsum("sfqk,fqkd->sfqd", attention, self.value_projection(region_tokens))
        text = self.text_projection(tokens)[:, None, None].expand_as(attended)
        joint = torch.cat([attended, regions.expand_as(attended), text], dim=-1)
        logits = self.score_head(joint).squeeze(-1)
        if self.config.dot_product_score:
            query = nn.functional.normalize(self.dot_query(tokens), dim=-1)
            key = nn.functional.normalize(self.dot_key(regions), dim=-1)
            logits = logits + self.dot_scale.exp() * torch.einsum("sd,fqd->sfq", query, key)
        return logits, self.refinement_head(joint)


class ReleasedFiltrationHead(SparrowPreTrainedModel):
    """Released variant: dot product with the proposer's query features, log objectness, gated ROI score.

        logit = (W_s e)(W_p f_i)^T / sqrt(d) + log(max(score_i, 1e-6)) + clamp(gate, 0, 1) * roi_score_i

    The attention over proposals and the embedding it refines do not see the ROI score. First frame only (`F` = 1).
    """

    config: FiltrationHeadConfig
    config_class = FiltrationHeadConfig

    def __init__(self, config: FiltrationHeadConfig, prompt_size: int, proposal_size: int, channels: list[int]):
        super().__init__(config)
        hidden, roi_hidden = config.hidden_size, config.roi_hidden_size
        self.token_projection = nn.Linear(prompt_size, hidden)
        self.proposal_projection = nn.Linear(proposal_size, hidden)
        self.fusion_projection = nn.Linear(proposal_size, prompt_size)
        self.box_head = None
        if config.box_regression:
            self.box_head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4))
        self.roi_query_projection = nn.Linear(prompt_size, roi_hidden)
        self.roi_text_projection = nn.Linear(prompt_size, roi_hidden)
        self.roi_token_projections = nn.ModuleList(nn.Linear(c, roi_hidden) for c in channels)
        self.roi_pool_projections = nn.ModuleList(nn.Linear(c, roi_hidden) for c in channels)
        self.roi_score_head = nn.Sequential(nn.Linear(3 * roi_hidden, roi_hidden), nn.ReLU(), nn.Linear(roi_hidden, 1))
        self.roi_gate = nn.Parameter(torch.tensor(config.roi_gate_init))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.constant_(self.roi_gate, self.config.roi_gate_init)

    def forward(
        self, tokens: torch.Tensor, proposals: RegionProposals, levels: list[torch.Tensor] | None
    ) -> FiltrationOutput:
        """As [`FiltrationHead.forward`]; `levels=None` leaves the ROI score out."""
        boxes, features, valid = proposals.boxes[0], proposals.features[0], proposals.valid[0]
        query, key = self.token_projection(tokens), self.proposal_projection(features)
        logits = query @ key.T / math.sqrt(self.config.hidden_size)
        if proposals.scores is not None:
            logits = logits + proposals.scores[0].clamp(min=1e-6).log()
        logits = logits.masked_fill(~valid, float("-inf"))
        attention = torch.nan_to_num(logits.softmax(dim=-1))
        refined_tokens = tokens
        if len(boxes):  # the bias counts only where there is something to attend to
            refined_tokens = tokens + self.fusion_projection(attention @ features)
        regressed = None
        if self.box_head is not None:
            S, Q = logits.shape
            pairs = torch.cat([query[:, None].expand(-1, Q, -1), key[None].expand(S, -1, -1)], dim=-1)
            corners = self.box_head(pairs).sigmoid().unflatten(-1, (2, 2))
            regressed = torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)[:, None]
        if levels is not None:
            logits = logits + self.roi_gate.clamp(0, 1) * self.score_regions(tokens, proposals.boxes[:1], levels)
        logits = logits[:, None]
        return FiltrationOutput(
            logits=logits,
            confidence=logits.sigmoid(),
            boxes=boxes.expand(len(tokens), 1, -1, -1),
            regressed_boxes=regressed,
            tokens=refined_tokens,
            attention=attention,
        )

    def score_regions(self, tokens: torch.Tensor, boxes: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
        """ROI score `(S, Q)` of boxes `(1, Q, 4)` on the pyramid of the first frame."""
        expected = [projection.in_features for projection in self.roi_token_projections]
        if [level.shape[1] for level in levels] != expected:
            raise ValueError(
                f"The ROI scorer was built for pyramid channels {expected}, "
                f"got {[level.shape[1] for level in levels]}."
            )
        pooled = [region[0] for region in pool_regions([level[:1] for level in levels], boxes, self.config)]
        region_tokens = torch.cat(
            [
                project(region.flatten(2).transpose(1, 2))
                for project, region in zip(self.roi_token_projections, pooled, strict=True)
            ],
            dim=1,
        )  # (Q, K, d)
        regions = torch.stack(
            [project(region.mean((-2, -1))) for project, region in zip(self.roi_pool_projections, pooled, strict=True)]
        ).mean(0)
        query = self.roi_query_projection(tokens) / math.sqrt(self.config.roi_hidden_size)
        attention = torch.einsum("sd,qkd->sqk", query, region_tokens).softmax(-1)
        attended = torch.einsum("sqk,qkd->sqd", attention, region_tokens)
        text = self.roi_text_projection(tokens)[:, None].expand_as(attended)
        return self.roi_score_head(torch.cat([attended, regions.expand_as(attended), text], dim=-1)).squeeze(-1)


def apply_box_offsets(boxes: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Shift and scale normalised xyxy boxes by offsets (dx, dy, log dw, log dh) in units of their own size.

    `(…, 4)` each, broadcast. Offsets in log space are held below log(4), so that a box cannot explode.
    """
    cxcywh = xyxy_to_cxcywh(boxes)
    center = cxcywh[..., :2] + offsets[..., :2] * cxcywh[..., 2:]
    size = cxcywh[..., 2:] * offsets[..., 2:].clamp(max=math.log(4.0)).exp()
    return cxcywh_to_xyxy(torch.cat([center, size], dim=-1))


def select_boxes(
    confidence: torch.Tensor, boxes: torch.Tensor, config: FiltrationHeadConfig, is_plural: bool | None = None
) -> torch.Tensor:
    """Indices of the proposals that one [BOX] embedding selects in one frame.

    All with confidence of at least `score_threshold`, or `plural_threshold` for an embedding that is known to mean
    several objects; if there is none, or the embedding is known to mean one object, the best one when it reaches
    `fallback_threshold`. Overlapping ones are suppressed if the config says so. At most `max_boxes_per_token` (0: no
    limit), then best first, otherwise in proposal order.

    Args:
        confidence: `(Q,)`, zero where the proposal is not valid.
        boxes: `(Q, 4)` normalised xyxy.
        is_plural: whether the embedding means several objects; None where nothing tells.
    """
    if not len(confidence):
        return torch.zeros(0, dtype=torch.int64, device=confidence.device)
    threshold = config.plural_threshold if is_plural else config.score_threshold
    chosen = (confidence >= threshold).nonzero().flatten()
    if not len(chosen) or is_plural is False:
        best = confidence.argmax()[None]
        return best[confidence[best] >= config.fallback_threshold]
    if config.nms_threshold is not None:
        chosen = chosen[non_maximum_suppression(boxes[chosen], confidence[chosen], config.nms_threshold)]
    if 0 < config.max_boxes_per_token < len(chosen):
        chosen = chosen[confidence[chosen].topk(config.max_boxes_per_token).indices]
    return chosen
