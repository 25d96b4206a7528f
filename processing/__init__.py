"""Everything between files and tensors: reading videos, preparing inputs, results and their exports.

The folder `processing/` is installed under the name `sparrow_processing`.
"""

from .errors import ExportError, LimitExceededError, PromptError, VideoGroundingError, VideoReadError
from .overlays import VideoWriter, draw_overlay, write_overlay
from .processing_sparrow import GroundingRequest, MaskCollector, MaskFrameStream, SparrowProcessor
from .results import GroundingResult, ObjectTrack
from .video_io import VideoLimits, VideoReader, open_video

__all__ = [
    "ExportError",
    "GroundingRequest",
    "GroundingResult",
    "LimitExceededError",
    "MaskCollector",
    "MaskFrameStream",
    "ObjectTrack",
    "PromptError",
    "SparrowProcessor",
    "VideoGroundingError",
    "VideoLimits",
    "VideoReadError",
    "VideoReader",
    "VideoWriter",
    "draw_overlay",
    "open_video",
    "write_overlay",
]
