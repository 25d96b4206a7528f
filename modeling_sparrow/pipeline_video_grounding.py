"""`pipeline("video-grounding")`: a video and a query to text, boxes and masks."""

from collections.abc import Iterator
from typing import Any

from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save


class VideoGroundingPipeline(Pipeline):
    """Grounds queries in videos.

    ```python
    import modeling_sparrow  # registers the model and this task with transformers
    from transformers import pipeline

    ground = pipeline("video-grounding", model="path/to/sparrow-tiny")
    result = ground("clip.mp4", "the red ring")
    result.text, result.objects[0].boxes, result.objects[0].masks
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.processor, "check_config"):
            raise ValueError("This pipeline needs a SparrowProcessor: pass processor=…, or a folder that has one.")
        self.processor.check_config(self.model.config)

    def _sanitize_parameters(self, task=None, max_frames=None, **generate_kwargs):
        prepare = {"task_name": task, "max_frames": max_frames}
        return {key: value for key, value in prepare.items() if value is not None}, generate_kwargs, {}

    def __call__(self, video: Any, text: str | list[str] | None = None, stream: bool = False, **kwargs) -> Any:
        """Ground one or several queries in one or several videos.

        Args:
            video: a clip as `sparrow_processing.open_video` takes it (path, folder, bytes, array, pictures), a dict
                `{"video": …, "text": …}`, or a list of clips or dicts.
            text: a query, or a list of queries about one video; with several videos one query for all, or a list
                with a query (or a list of queries) for each.
            stream: for one video, yield the masks of each frame as soon as they are known instead.
            kwargs: `task` (`refer`, `box`, `describe`, `ask`), `max_frames`, and whatever `generate` takes.

        Returns:
            A `GroundingResult`; a list of them for a list of queries; a list of either for a list of videos. With
            `stream`, an iterator of dicts `frame` (index), `time` (seconds), `query`, `objects`: list of `id`,
            `score`, `visible`, `box` (pixels xyxy or None) and `mask` (bool `(H, W)`). Frames come back from the
            prompted one, then forwards.
        """
        items, single = self._items(video, text)
        if stream:
            if not single:
                raise ValueError("stream=True works on one video at a time.")
            prepare, generate_kwargs, _ = self._sanitize_parameters(**kwargs)
            return self._stream(items[0], self._preprocess_params | prepare, self._forward_params | generate_kwargs)
        results = [super(VideoGroundingPipeline, self).__call__(item, **kwargs) for item in items]
        return results[0] if single else results

    def _items(self, video: Any, text: Any) -> tuple[list[dict[str, Any]], bool]:
        """One dict per video, and whether a single video was meant."""
        if isinstance(video, dict):
            return [{"video": video["video"], "text": video.get("text", text)}], True
        if not self.processor.is_list_of_videos(video):
            return [{"video": video, "text": text}], True
        if isinstance(text, (list, tuple)) and len(text) != len(video):
            raise ValueError(f"{len(text)} queries were given for {len(video)} videos.")
        texts = text if isinstance(text, (list, tuple)) else [text] * len(video)
        return [self._items(clip, words)[0][0] for clip, words in zip(video, texts, strict=True)], False

    def preprocess(self, inputs: dict[str, Any], task_name: str = "refer", max_frames: int | None = None):
        text = inputs["text"]
        model_inputs = self.processor(
            text=text, videos=[inputs["video"]], task=task_name, stream=True, max_frames=max_frames
        )
        return {"model_inputs": dict(model_inputs), "several": isinstance(text, (list, tuple))}

    def _forward(self, inputs: dict[str, Any], **generate_kwargs):
        collector = self.processor.collector(inputs["model_inputs"]["metadata"])
        output = self.model.ground(**inputs["model_inputs"], mask_sink=collector, **generate_kwargs)
        return {"output": output, "masks": collector, "several": inputs["several"]}

    def postprocess(self, outputs: dict[str, Any]):
        results = self.processor.post_process_grounding(outputs["output"], outputs["masks"])
        return results if outputs["several"] else results[0]

    def _stream(self, item: dict[str, Any], prepare: dict, generate_kwargs: dict) -> Iterator[dict[str, Any]]:
        inputs = self._ensure_tensor_on_device(self.preprocess(item, **prepare), device=self.device)["model_inputs"]
        requests = inputs["metadata"]
        collector = self.processor.collector(requests)
        with self.device_placement():
            for row, masks in self.model.ground_iter(**inputs, **generate_kwargs):
                collector(row, masks)
                yield {
                    "frame": masks.frame_index,
                    "time": float(requests[row].timestamps[masks.frame_index]),
                    "query": requests[row].query,
                    "objects": [collector.frame_object(row, k, masks.frame_index) for k in masks.objects],
                }

    def save_pretrained(self, save_directory, **kwargs):
        """Also writes what the base class leaves out: the processor, and this file if it came from a repository."""
        if hasattr(self, "_registered_impl"):  # goes into config.json, where no path of this machine belongs
            self._registered_impl = {
                task: {name: value for name, value in info.items() if name != "default"}
                for task, info in self._registered_impl.items()
            }
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if not hasattr(self, "_registered_impl"):
            custom_object_save(self, save_directory)
