"""Host 1: VideoGLaMM (arXiv 2411.04923), the video language model that official SPARROW is built on.

A spatial tower (CLIP) and a temporal tower (InternVideo2) see the same sampled frames; two adapters and average
pooling turn their features into tokens for a causal language model.
"""

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from .configuration_sparrow import SparrowConfig
from .modeling_base import SparrowPreTrainedModel, grad_if_trainable
from .modeling_internvideo2 import InternVideo2Model
from .tracked_features import select_medoids


class VisionAdapter(nn.Module):
    """V->L adapter: tower features `(…, D_v)` to language embeddings `(…, D)`."""

    def __init__(self, input_size: int, output_size: int):
        super().__init__()
        self.fc1 = nn.Linear(input_size, output_size)
        self.fc2 = nn.Linear(output_size, output_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(features)))


class VideoGlammHost(SparrowPreTrainedModel):
    """Embeds text, frames and tracked features into one sequence for `language_model`.

    A host offers `embed(…)`, `language_model`, and the names of its parts that training freezes or adapts:
    `towers` and `adapters`.
    """

    towers = ("spatial_tower", "temporal_tower")
    adapters = ("spatial_adapter", "temporal_adapter")

    def __init__(self, config: SparrowConfig):
        super().__init__(config)
        text_size = config.text_config.hidden_size
        self.spatial_tower = AutoModel.from_config(config.spatial_config)
        self.temporal_tower = InternVideo2Model(config.temporal_config)
        self.spatial_adapter = VisionAdapter(config.spatial_config.hidden_size, text_size)
        self.temporal_adapter = VisionAdapter(config.temporal_config.hidden_size, text_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.language_model.set_output_embeddings(value)

    def encode_pictures(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Spatial tower and adapter on pictures `(F, 3, h, w)`: `(F, patches, D)`, class token dropped."""
        layer = self.config.spatial_feature_layer
        with grad_if_trainable(self.spatial_tower):
            hidden_states = self.spatial_tower(pixel_values, output_hidden_states=[layer]).hidden_states[layer]
        return self.spatial_adapter(hidden_states[:, 1:])

    def encode_chunks(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Temporal tower and adapter on chunks of frames `(C, t, 3, h, w)`: `(C, steps, patches, D)`."""
        with grad_if_trainable(self.temporal_tower):
            hidden_states = self.temporal_tower(pixel_values).last_hidden_state
        steps = self.config.temporal_config.num_frames // self.config.temporal_config.tubelet_size
        return self.temporal_adapter(hidden_states[:, 1:].unflatten(1, (steps, -1)))

    def encode_videos(
        self,
        spatial_pixel_values: torch.Tensor,
        temporal_pixel_values: torch.Tensor | None,
        num_frames: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Visual tokens of each clip, `(tokens, D)`: all spatial tokens frame by frame, then all temporal ones.

        Args:
            spatial_pixel_values: `(F, 3, h, w)`, the frames of all clips one after the other.
            temporal_pixel_values: `(F', 3, h', w')`, likewise, without clips of one frame; those are still pictures,
                which only the spatial tower sees and which are not pooled.
            num_frames: `(V,)` frames of each clip, 1 or a multiple of the temporal tower's chunk.
        """
        counts = num_frames.tolist()
        chunk = self.config.temporal_config.num_frames
        if bad := [count for count in counts if count != 1 and count % chunk]:
            raise ValueError(f"A clip must have 1 frame or a multiple of {chunk}, got {bad}.")
        spatial = self.encode_pictures(spatial_pixel_values).split(counts)
        temporal_counts = [count // chunk for count in counts if count > 1]
        temporal = iter(())
        if temporal_counts:
            temporal = iter(self.encode_chunks(temporal_pixel_values.unflatten(0, (-1, chunk))).split(temporal_counts))
        videos = []
        for count, frames in zip(counts, spatial, strict=True):
            if count == 1:
                videos.append(frames.flatten(0, 1))
                continue
            pooled = pool_tokens(frames, self.config.spatial_pool_size).flatten(0, 1)
            steps = pool_tokens(next(temporal).flatten(0, 1), self.config.temporal_pool_size).flatten(0, 1)
            videos.append(torch.cat([pooled, steps]))
        return videos

    def encode_tracked_features(self, pixel_values: torch.Tensor, num_crops: torch.Tensor) -> list[torch.Tensor]:
        """Tracked features (TSF) of each row, `(K or fewer, D)`: one vector per crop, K medoids of them.

        Args:
            pixel_values: `(crops, 3, h, w)`, the crops of all rows one after the other.
            num_crops: `(B,)` crops of each row, 0 for none.
        """
        vectors = self.encode_pictures(pixel_values).mean(dim=1)
        config = self.config
        return [
            select_medoids(row, config.tsf_num_clusters, config.tsf_iterations)
            for row in vectors.split(num_crops.tolist())
        ]

    def embed(
        self,
        input_ids: torch.Tensor,
        spatial_pixel_values: torch.Tensor | None = None,
        temporal_pixel_values: torch.Tensor | None = None,
        num_frames: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        tsf_pixel_values: torch.Tensor | None = None,
        num_tsf_crops: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings `(B, L, D)` of token ids with their placeholders filled.

        Args:
            input_ids: `(B, L)`; `video_token_id` and `tsf_token_id` stand where features go.
            spatial_pixel_values, temporal_pixel_values, num_frames: as in `encode_videos`.
            video_index: `(B,)` clip of each row; rows may share one. Default: row b has clip b.
            tsf_pixel_values, num_tsf_crops: as in `encode_tracked_features`; rows with placeholders but no crops get
                zero vectors, as in released training.

        Raises:
            ValueError: if a row has not as many placeholders as its clip or crops give features.
        """
        video_id, tsf_id = self.config.video_token_id, self.config.tsf_token_id
        is_placeholder = (input_ids == video_id) | (input_ids == tsf_id)
        # placeholder ids may lie beyond the embedding table
        embeddings = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))
        if spatial_pixel_values is not None:
            videos = self.encode_videos(spatial_pixel_values, temporal_pixel_values, num_frames)
            rows = range(len(input_ids)) if video_index is None else video_index.tolist()
            features = [videos[row] if row < len(videos) else embeddings[0, :0] for row in rows]
            embeddings = _fill(embeddings, input_ids == video_id, features, "video")
        elif (input_ids == video_id).any():
            raise ValueError("The prompt has video placeholders, but no spatial_pixel_values were given.")
        is_tsf = input_ids == tsf_id
        if tsf_pixel_values is not None:
            crops = self.encode_tracked_features(tsf_pixel_values, num_tsf_crops)
            zeros = [embeddings.new_zeros(int(count), embeddings.shape[-1]) for count in is_tsf.sum(1)]
            crops = [row if len(row) else zero for row, zero in zip(crops, zeros, strict=True)]
            embeddings = _fill(embeddings, is_tsf, crops, "tracked-feature")
        elif is_tsf.any():
            embeddings = embeddings.masked_fill(is_tsf[..., None], 0.0)
        return embeddings


def pool_tokens(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """Adaptive average pooling of a square grid of tokens, `(F, h * h, D)` to `(F, side * side, D)`."""
    grid = round(tokens.shape[1] ** 0.5)
    pooled = nn.functional.adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(2, (grid, grid)), side)
    return pooled.flatten(2).transpose(1, 2)


def _fill(embeddings: torch.Tensor, mask: torch.Tensor, features: list[torch.Tensor], what: str) -> torch.Tensor:
    """Put the features of each row at its placeholders; rows without placeholders keep their embeddings."""
    used = []
    for row, (count, feature) in enumerate(zip(mask.sum(1).tolist(), features, strict=True)):
        if count and count != len(feature):
            raise ValueError(
                f"Row {row} has {count} {what} placeholders, but its input gives {len(feature)} features."
            )
        if count:
            used.append(feature)
    if not used:
        return embeddings
    return embeddings.masked_scatter(mask[..., None], torch.cat(used).to(embeddings.dtype))
