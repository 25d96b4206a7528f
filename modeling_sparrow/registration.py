"""Makes transformers know SPARROW: Auto classes and the task `video-grounding`."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from sparrow_processing import SparrowProcessor

from .configuration_sparrow import SparrowConfig
from .modeling_sparrow import SparrowForVideoGrounding
from .pipeline_video_grounding import VideoGroundingPipeline

TASK = "video-grounding"
# A small model that knows the generated world, shipped with the package.
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "sparrow-tiny")


def register():
    """Register everything; may be called again."""
    AutoConfig.register(SparrowConfig.model_type, SparrowConfig, exist_ok=True)
    # An exported config.json names the pipeline beside it. Here the task is known: no trust is needed to use it.
    SparrowConfig.custom_pipelines = property(
        lambda config: {}, lambda config, value: vars(config).update(custom_pipelines=value)
    )
    AutoModel.register(SparrowConfig, SparrowForVideoGrounding, exist_ok=True)
    AutoProcessor.register(SparrowConfig, SparrowProcessor, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=VideoGroundingPipeline,
            pt_model=AutoModel,
            default={"model": (DEFAULT_CHECKPOINT, None)},
            type="multimodal",
        )
