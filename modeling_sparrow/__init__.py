"""SPARROW for Transformers: a query about a video answered with text, boxes and masks.

Importing this package registers its configuration, model, processor and the task `video-grounding` with transformers,
so that `AutoModel`, `AutoProcessor` and `pipeline` work without a trust flag.

Sizes in the docstrings: `B` rows of a batch, `V` videos, `T` frames, `N` objects, `S` [BOX] or [SEG] tokens, `Q`
proposals, `F` frames taken together, `H, W` pixels of the video, `h, w` of a feature grid, `D` width, `L` tokens.
"""

from sparrow_processing import GroundingResult, ObjectTrack, SparrowProcessor

from .configuration_sparrow import (
    FiltrationHeadConfig,
    InternVideo2Config,
    MaskTrackerConfig,
    RegionProposerConfig,
    SparrowConfig,
)
from .modeling_base import SparrowPreTrainedModel
from .modeling_outputs import GroundedObject, GroundingOutput, SparrowModelOutput, SparrowOutput
from .modeling_sparrow import SparrowForVideoGrounding, SparrowModel
from .pipeline_video_grounding import VideoGroundingPipeline
from .registration import DEFAULT_CHECKPOINT, register

__version__ = "0.1.0"

register()

__all__ = [
    "DEFAULT_CHECKPOINT",
    "FiltrationHeadConfig",
    "GroundedObject",
    "GroundingOutput",
    "GroundingResult",
    "InternVideo2Config",
    "MaskTrackerConfig",
    "ObjectTrack",
    "RegionProposerConfig",
    "SparrowConfig",
    "SparrowForVideoGrounding",
    "SparrowModel",
    "SparrowModelOutput",
    "SparrowOutput",
    "SparrowPreTrainedModel",
    "SparrowProcessor",
    "VideoGroundingPipeline",
]
