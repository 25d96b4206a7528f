"""Videos and questions to tensors, and back again from answers and masks to results."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from modeling_sparrow import SparrowConfig, SparrowProcessor
from modeling_sparrow.modeling_outputs import GroundedObject, GroundingOutput
from sparrow_processing import open_video
from sparrow_processing.errors import PromptError
from sparrow_processing.pixel_streams import proposer_pixels, segmenter_pixels, spatial_pixels, temporal_pixels
from sparrow_processing.processing_sparrow import GroundingRequest, read_time_span
from sparrow_processing.results import mask_to_box

from ..byte_tokenizer import byte_tokenizer
from ..tiny import IDS, SIZE, TOKENIZER, random_clip, random_config, say
from .clip_factory import number_of, write_clip

VIDEO, TSF = IDS["video_token_id"], IDS["tsf_token_id"]


@pytest.fixture(scope="module")
def byte_processor():
    return random_processor_with(byte_tokenizer())


def random_processor_with(tokenizer, **overrides):
    return SparrowProcessor.from_config(random_config(), tokenizer, spatial_crop=False, **overrides)


def words(row) -> list[str]:
    """Tokens of a prompt without padding and placeholders."""
    return [token for token in TOKENIZER.convert_ids_to_tokens(row) if token not in ("<pad>", "<video>", "<tsf>")]


# --- inputs ---


@pytest.mark.parametrize(
    ("num_frames", "sampled", "padded", "placeholders"),
    [  # 4 frames are sampled, chunks of 2 frames, 2 x 2 tokens of each tower; a picture has 4 x 4 tokens of one
        (1, [0], 1, 16),
        (2, [0, 1], 2, 16),
        (3, [0, 1, 2], 4, 32),
        (4, [0, 1, 2, 3], 4, 32),
        (5, [0, 1, 2, 4], 4, 32),
        (9, [0, 2, 5, 8], 4, 32),
    ],
)
def test_shapes_of_all_inputs(num_frames, sampled, padded, placeholders, processor, shared_model):
    inputs = processor(text="the red ring", videos=random_clip(num_frames))
    expected = {
        "spatial_pixel_values": (padded, 3, 32, 32),
        "temporal_pixel_values": (padded, 3, 32, 32),
        "mask_pixel_values": (1, num_frames, 3, SIZE, SIZE),
    }
    if num_frames == 1:
        del expected["temporal_pixel_values"]
    others = {"input_ids", "attention_mask", "video_index", "num_frames", "num_mask_frames", "original_sizes"}
    assert set(inputs) == {*expected, *others, "metadata"}
    for name, shape in expected.items():
        assert inputs[name].shape == shape and inputs[name].dtype == torch.float32
    assert inputs["num_frames"].tolist() == [padded] and inputs["num_mask_frames"].tolist() == [num_frames]
    assert inputs["video_index"].tolist() == [0] and inputs["original_sizes"].tolist() == [[48, 64]]
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape and inputs["attention_mask"].all()
    assert inputs["metadata"][0].sampled_frames == sampled
    assert (inputs["input_ids"] == VIDEO).sum() == placeholders == shared_model.config.num_visual_tokens(len(sampled))
    generate = {name: inputs[name] for name in inputs if name != "metadata"}
    assert shared_model.generate(**generate, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"temporal_config": {"num_frames": 4, "tubelet_size": 2}, "num_frames": 8},
        {"spatial_config": {"image_size": 40, "patch_size": 10}, "spatial_pool_size": 3, "temporal_pool_size": 4},
    ],
)
def test_placeholders_follow_the_rule_of_the_model(overrides):
    config = random_config(**overrides)
    processor = SparrowProcessor.from_config(config, TOKENIZER)
    for count in range(1, 10):
        assert processor.num_visual_tokens(count) == config.num_visual_tokens(count)
        assert processor.prompt_ids("a ring", "refer", count).count(VIDEO) == config.num_visual_tokens(count)
    assert VIDEO not in processor.prompt_ids("a ring", "ask", 0)


def test_placeholders_of_released_sizes():
    """16 frames: 12 x 12 tokens of CLIP and 8 x 8 of InternVideo2 each; a picture: 24 x 24 of CLIP."""
    config = SparrowConfig(**IDS)
    processor = SparrowProcessor.from_config(config, TOKENIZER)
    assert (processor.num_visual_tokens(16), processor.num_visual_tokens(1)) == (16 * (144 + 64), 576)
    assert (config.num_visual_tokens(16), config.num_visual_tokens(1)) == (16 * (144 + 64), 576)


def test_prompt_is_what_the_template_writes(processor):
    inputs = processor(text="  the red ring ", videos=random_clip(4))
    question = ["what", "is", "the", "red", "ring", "in", "this", "video", "?"]
    wish = ["please", "respond", "with", "segmentation", "masks", "."]
    assert words(inputs["input_ids"][0]) == ["<|user|>", *question, *wish, "<|end|>", "<|assistant|>"]
    assert inputs["metadata"][0].query == "the red ring"
    box = processor(text="the red ring", videos=random_clip(4), task="box")["input_ids"][0]
    assert words(box)[1:8] == ["can", "you", "segment", "the", "red", "ring", "in"]
    ask = processor(text="the red ring", videos=random_clip(4), task="ask")["input_ids"][0]
    assert words(ask) == ["<|user|>", "the", "red", "ring", "<|end|>", "<|assistant|>"]
    describe = processor(videos=random_clip(4), task="describe")
    assert "description" in words(describe["input_ids"][0]) and describe["metadata"][0].task == "describe"


def test_rows_are_padded_on_the_left(processor):
    queries = ["the ring", "the large red ring that moves to the left"]
    inputs = processor(text=queries, videos=random_clip(4))
    for row, query in enumerate(queries):
        (alone,) = processor(text=query, videos=random_clip(4))["input_ids"]
        missing = inputs["input_ids"].shape[1] - len(alone)
        assert inputs["attention_mask"][row].tolist() == [0] * missing + [1] * len(alone)
        assert inputs["input_ids"][row, missing:].tolist() == alone.tolist()
        assert set(inputs["input_ids"][row, :missing].tolist()) <= {TOKENIZER.pad_token_id}


def test_several_queries_about_one_video(processor):
    inputs = processor(text=["a ring", "a star", "the red ring"], videos=random_clip(6))
    assert inputs["video_index"].tolist() == [0, 0, 0] and len(inputs["input_ids"]) == 3
    assert len(inputs["spatial_pixel_values"]) == 4 and len(inputs["mask_pixel_values"]) == 1
    assert [request.query for request in inputs["metadata"]] == ["a ring", "a star", "the red ring"]


@pytest.mark.parametrize(
    ("text", "index", "queries"),
    [
        ("a ring", [0, 1], ["a ring", "a ring"]),
        (["a ring", "a star"], [0, 1], ["a ring", "a star"]),
        ([["a ring", "a star"], ["the ring"]], [0, 0, 1], ["a ring", "a star", "the ring"]),
        ([[], ["the ring"]], [1], ["the ring"]),
    ],
)
def test_queries_about_several_videos(text, index, queries, processor, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", count=3, width=32, height=64)
    inputs = processor(text=text, videos=[random_clip(6), path])
    assert inputs["video_index"].tolist() == index
    assert [request.query for request in inputs["metadata"]] == queries
    assert [request.path for request in inputs["metadata"]] == [[None, str(path)][video] for video in index]
    assert [request.size for request in inputs["metadata"]] == [[(48, 64), (64, 32)][video] for video in index]
    assert inputs["original_sizes"].tolist() == [[48, 64], [64, 32]]
    assert inputs["num_frames"].tolist() == [4, 4] and inputs["num_mask_frames"].tolist() == [6, 3]
    masks = inputs["mask_pixel_values"]
    assert masks.shape == (2, 6, 3, SIZE, SIZE)
    assert torch.equal(masks[1, 2:3].expand(4, -1, -1, -1), masks[1, 2:])  # padded with the last frame


def test_pixels_are_those_of_the_sampled_frames(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=9))
    frames = list(reader)
    assert [number_of(frame) for frame in frames] == list(range(9))
    processor = SparrowProcessor.from_config(random_config(), TOKENIZER)
    inputs = processor(text="a ring", videos=reader)
    for row, index in enumerate([0, 2, 5, 8]):
        assert torch.equal(inputs["spatial_pixel_values"][row], spatial_pixels(frames[index], 32))
        assert torch.equal(inputs["temporal_pixel_values"][row], temporal_pixels(frames[index], 32))
    for index in range(9):
        assert torch.equal(inputs["mask_pixel_values"][0, index], segmenter_pixels(frames[index], SIZE))


def test_padding_repeats_the_last_sampled_frame(processor):
    inputs = processor(text="a ring", videos=random_clip(3))
    for name in ("spatial_pixel_values", "temporal_pixel_values"):
        assert torch.equal(inputs[name][3], inputs[name][2]) and not torch.equal(inputs[name][2], inputs[name][1])


def test_whole_frame_or_centre_of_the_spatial_tower(processor):
    clip = random_clip(2)
    cropping = SparrowProcessor.from_config(random_config(), TOKENIZER)
    assert torch.equal(processor(text="x", videos=clip)["spatial_pixel_values"][0], spatial_pixels(clip[0], 32, False))
    assert torch.equal(cropping(text="x", videos=clip)["spatial_pixel_values"][0], spatial_pixels(clip[0], 32, True))


def test_own_pictures_of_the_proposer():
    processor = SparrowProcessor.from_config(random_config(proposer_config={"image_size": 48}), TOKENIZER)
    clips = [random_clip(3), random_clip(2, seed=1)]
    pixels = processor(text="a ring", videos=clips)["proposer_pixel_values"]
    assert pixels.shape == (2, 3, 48, 48)
    for row, clip in enumerate(clips):
        assert torch.equal(pixels[row], proposer_pixels(segmenter_pixels(clip[0], SIZE), 48))


def test_max_frames(processor):
    inputs = processor(text="a ring", videos=random_clip(9), max_frames=3)
    (request,) = inputs["metadata"]
    assert inputs["num_mask_frames"].tolist() == [3] and len(request.timestamps) == 3
    assert request.sampled_frames == [0, 1, 2] and any("3 of 9 frames" in warning for warning in request.warnings)
    assert processor(text="a ring", videos=random_clip(2), max_frames=3)["metadata"][0].warnings == []
    with pytest.raises(ValueError, match="at least 1 frame"):
        processor(text="a ring", videos=random_clip(2), max_frames=0)


def test_a_still_picture(processor, tmp_path):
    Image.fromarray(random_clip(1)[0]).save(tmp_path / "picture.png")
    for video in (tmp_path / "picture.png", random_clip(1), Image.fromarray(random_clip(1)[0])):
        inputs = processor(text="a ring", videos=video)
        assert "temporal_pixel_values" not in inputs and (inputs["input_ids"] == VIDEO).sum() == 16
        assert inputs["metadata"][0].timestamps.tolist() == [0]


@pytest.mark.parametrize(
    ("videos", "is_list"),
    [
        ("clip.mp4", False),
        (b"bytes", False),
        (np.zeros((2, 4, 4, 3)), False),
        ([np.zeros((4, 4, 3))] * 2, False),
        ([torch.zeros(3, 4, 4)] * 2, False),
        ([Image.new("RGB", (4, 4))], False),
        ([], False),
        (["clip.mp4"], True),
        ([np.zeros((2, 4, 4, 3))], True),
        ([[Image.new("RGB", (4, 4))]], True),
        (("a.mp4", "b.mp4"), True),
    ],
)
def test_a_list_of_pictures_is_one_clip(videos, is_list):
    assert SparrowProcessor.is_list_of_videos(videos) is is_list


def test_tracked_crops(processor):
    crops = [random_clip(1, 20, 30, seed=index)[0] for index in range(6)]
    inputs = processor(
        text=["a ring", "a star", "the ring"], videos=random_clip(4), tracked_crops=[crops, None, crops[:1]]
    )
    rows = inputs["input_ids"]
    assert (rows == TSF).sum(1).tolist() == [4, 0, 1]  # K = 4 at most
    assert inputs["num_tsf_crops"].tolist() == [6, 0, 1] and inputs["tsf_pixel_values"].shape == (7, 3, 32, 32)
    assert torch.equal(inputs["tsf_pixel_values"][2], spatial_pixels(crops[2], 32, False))
    first = (rows[0] == TSF).nonzero().flatten()
    assert (rows[0] == VIDEO).nonzero().max() < first.min()
    following = TOKENIZER.convert_ids_to_tokens(rows[0, first.max() + 1 :])
    assert following == ["<|end|>", "<|assistant|>"] and (first.diff() == 1).all()


def test_no_crops_at_all_is_no_stream(processor):
    inputs = processor(text="a ring", videos=random_clip(4), tracked_crops=[[]])
    assert "tsf_pixel_values" not in inputs and (inputs["input_ids"] == TSF).sum() == 0
    with pytest.raises(ValueError, match="each of 2 queries, got 1"):
        processor(text=["a ring", "a star"], videos=random_clip(4), tracked_crops=[None])


def test_frame_stream_gives_the_frames_of_the_tensor(processor, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", count=7)
    whole = processor(text="a ring", videos=path)["mask_pixel_values"][0]
    inputs = processor(text="a ring", videos=[path, random_clip(2)], stream=True)
    assert "mask_pixel_values" not in inputs and "num_mask_frames" not in inputs
    stream, other = inputs["frames"]
    assert (len(stream), len(other)) == (7, 2)
    assert torch.equal(torch.stack(list(stream.frames())), whole)
    assert torch.equal(torch.stack(list(stream.frames(5))), whole[5:])
    assert torch.equal(torch.stack(list(stream.frames_reversed(4))), whole[:5].flip(0))
    assert torch.equal(stream.read([6, 0, 0]), whole[[6, 0, 0]])


def test_wrong_arguments(processor):
    clip = random_clip(2)
    for arguments, message in [
        ({"text": "a ring"}, "No video"),
        ({"text": "a ring", "videos": clip, "task": "guess"}, r"'guess'.*refer, box, describe, ask"),
        ({"text": "a ring", "videos": clip, "return_tensors": "np"}, "'pt'"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(**arguments)


# --- saving, and fitting the model ---


def assert_same_processor(first, second):
    settings = [
        {name: value for name, value in vars(processor).items() if name not in ("tokenizer", "chat_template")}
        for processor in (first, second)
    ]
    assert settings[0] == settings[1]
    clip = random_clip(5)
    a, b = first(text=["the red ring", "a [SEG]"], videos=clip), second(text=["the red ring", "a [SEG]"], videos=clip)
    assert set(a) == set(b)
    for name in set(a) - {"metadata"}:
        assert torch.equal(a[name], b[name])


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert_same_processor(processor, SparrowProcessor.from_pretrained(tmp_path))


def test_auto_processor(checkpoint, processor):
    loaded = AutoProcessor.from_pretrained(checkpoint)
    assert type(loaded) is SparrowProcessor
    assert_same_processor(processor, loaded)


def test_own_template_and_prompts_survive_saving(tmp_path):
    template = "{% for message in messages %}<|user|>{% for item in message.content %}"
    template += (
        "{% if item.type == 'text' %} say : {{ item.text }}{% else %} <video>{% endif %}{% endfor %}{% endfor %}"
    )
    prompts = {"refer": "find {query} !", "count": "{query}"}
    mine = random_processor_with(TOKENIZER, chat_template=template, task_prompts=prompts, mask_threshold=0.5)
    mine.save_pretrained(tmp_path)
    loaded = SparrowProcessor.from_pretrained(tmp_path)
    assert (loaded.task_prompts, loaded.chat_template, loaded.mask_threshold) == (prompts, template, 0.5)
    assert_same_processor(mine, loaded)
    ids = loaded.prompt_ids("{query} {ring}", "refer")  # braces in a query are no fields
    expected = TOKENIZER.encode("<|user|> say : find {query} {ring} !", add_special_tokens=False)
    assert ids == expected
    with pytest.raises(PromptError, match="knows count, refer"):
        loaded(text="a ring", videos=random_clip(2), task="box")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seg_token_id": 9}, r"\[SEG\]: processor 4, model 9"),
        ({"box_token_id": 4, "seg_token_id": 3}, r"\[BOX\]: processor 3, model 4; \[SEG\]: processor 4, model 3"),
        ({"video_token_id": 300}, "<video>: processor 5, model 300"),
        ({"spatial_pool_size": 3}, "spatial_pool_size: processor 2, model 3"),
        ({"proposer_config": {"image_size": 48}}, "proposer_size: processor None, model 48"),
    ],
)
def test_model_of_another_tokenizer_or_size(overrides, message, processor):
    config = random_config(**overrides)
    with pytest.raises(ValueError, match=message):
        processor.check_config(config)
    if "token_id" in str(overrides):
        with pytest.raises(ValueError, match=message):
            SparrowProcessor.from_config(config, TOKENIZER)


@pytest.mark.parametrize("unk_token", ["<unk>", None])
def test_tokenizer_without_the_tokens(unk_token):
    with pytest.raises(ValueError, match=r"lacks \[BOX\], <tsf>\. Add them: tokenizer\.add_special_tokens"):
        SparrowProcessor(byte_tokenizer(["<pad>", "<unk>", "<|end|>", "[SEG]", "<video>"], unk_token))


# --- answers ---


def answer_of(processor, text):
    """What `read_answer` makes of an answer, an object for each [SEG], else for each [BOX]."""
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    token = IDS["seg_token_id"] if IDS["seg_token_id"] in ids else IDS["box_token_id"]
    positions = [position for position, index in enumerate(ids) if index == token]
    clean, phrases = processor.read_answer(torch.tensor(ids), positions)
    for phrase, span in phrases:
        assert (phrase is None) == (span is None)
        assert span is None or clean[slice(*span)] == phrase
    return clean, [phrase for phrase, _ in phrases]


ANSWERS = {
    "it is [BOX] [SEG] . <|end|>": ("it is.", [None]),
    "<p> the dog </p> [BOX] [SEG] . <|end|> <pad> <pad>": ("the dog.", ["the dog"]),
    "<p>the dog</p>[BOX][SEG]": ("the dog", ["the dog"]),
    "<p> a dog </p> [BOX] [SEG] and <p> a cat </p> [BOX] [SEG]": ("a dog and a cat", ["a dog", "a cat"]),
    "Well , <p> two dogs </p> [BOX] [SEG] [BOX] [SEG] play": ("Well, two dogs play", ["two dogs", "two dogs"]),
    "<p> a dog </p> sees it [BOX] [SEG]": ("a dog sees it", [None]),
    "[BOX] [SEG] <p> a dog </p>": ("a dog", [None]),
    "<p> a <p> dog </p> [SEG]": ("a dog", ["dog"]),
    "<p> a dog [SEG]": ("a dog", [None]),
    "<p> a dog </p> [SEG] <p> a cat [SEG]": ("a dog a cat", ["a dog", None]),
    "a dog </p> [SEG]": ("a dog", [None]),
    "<p> a dog </p> </p> [SEG]": ("a dog", ["a dog"]),
    "<p> </p> [SEG]": ("", [None]),
    "<p> one [SEG] two </p> [SEG]": ("one two", [None, "one two"]),
    "so : <p> a dog , black </p> [BOX] ; yes !": ("so: a dog, black; yes!", ["a dog, black"]),
    "<p> a dog </p> [BOX]": ("a dog", ["a dog"]),
    "there is no such object . <|end|>": ("there is no such object.", []),
    "<|end|>": ("", []),
    "": ("", []),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_text_and_phrases_of_an_answer(answer, byte_processor):
    assert answer_of(byte_processor, answer) == ANSWERS[answer]


def test_words_that_look_like_tokens_are_words(byte_processor):
    """Only ids count: an answer may spell [SEG] letter by letter."""
    ids = byte_processor.tokenizer.encode("say [SEG] <p> a dog </p>", split_special_tokens=True)
    seg = IDS["seg_token_id"]
    assert seg not in ids
    text, phrases = byte_processor.read_answer(torch.tensor([*ids, seg, *ids]), [len(ids)])
    assert text == "say [SEG] a dog say [SEG] a dog" and phrases == [("a dog", (10, 15))]


def test_text_of_many_bytes(byte_processor):
    assert answer_of(byte_processor, "<p> la tortue à gauche 🐢 </p> [SEG]") == (
        "la tortue à gauche 🐢",
        ["la tortue à gauche 🐢"],
    )


def request_of(num_frames=8, sampled=(0, 2, 4, 7), size=(48, 64), task="refer"):
    timestamps = np.arange(num_frames) / 4
    return GroundingRequest("the ring", task, None, size, 4.0, timestamps, list(sampled), [])


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("it is in frames:(1,3).", (0.5, 1.75)),
        ("frames : ( 3 , 0 )", (0.0, 1.75)),
        ("frames:(2,2)", (1.0, 1.0)),
        ("frames:(0,99999999999999999999)", (0.0, 1.75)),
        ("frames: one to three", None),
        ("", None),
    ],
)
def test_time_span(text, span):
    assert read_time_span(text, request_of()) == span


# --- masks ---


def output_of(processor, masks, answer="it is [BOX] [SEG] .", request=None, object_logits=None, scores=None):
    """Output of `ground` with given mask logits `(N, T, h, w)`, and object `k` grounded by the k-th [SEG]."""
    ids = processor.tokenizer.encode(answer, add_special_tokens=False)
    positions = [position for position, index in enumerate(ids) if index == IDS["seg_token_id"]]
    N, T = masks.shape[:2]
    object_logits = torch.ones(N, T) if object_logits is None else object_logits
    scores = torch.full((N, T), 0.75) if scores is None else scores
    box, boxes = torch.tensor([0.1, 0.1, 0.4, 0.4]), torch.full((T, 4), torch.nan)
    objects = [
        GroundedObject(positions[k], 0, box, 0.5, scores[k], object_logits[k], boxes, masks[k]) for k in range(N)
    ]
    request = request or request_of(T, range(T))
    return GroundingOutput(torch.tensor([ids]), [objects], [T], [[]], {"generate": 0.25}, [request])


def box_logits(boxes, side=256):
    """Logits `(T, side, side)` over the square frame, positive within normalised xyxy boxes."""
    centres = (torch.arange(side) + 0.5) / side
    frames = []
    for x0, y0, x1, y1 in boxes:
        columns, rows = (centres >= x0) & (centres < x1), (centres >= y0) & (centres < y1)
        frames.append(torch.where(rows[:, None] & columns, 8.0, -8.0))
    return torch.stack(frames)


@pytest.mark.parametrize("size", [(48, 96), (96, 48), (63, 127), (127, 61), (480, 854), (256, 256)])
def test_masks_come_back_at_their_place(size, processor):
    H, W = size
    boxes = [(0.25, 0.5, 0.5, 0.75), (0.0, 0.0, 0.125, 1.0), (0.875, 0.125, 1.0, 0.25)]
    output = output_of(processor, box_logits(boxes)[None], request=request_of(3, range(3), size))
    (track,) = processor.post_process_grounding(output)[0]
    for frame, box in enumerate(boxes):
        expected = np.array(box) * [W, H, W, H]
        np.testing.assert_allclose(track.boxes[frame], expected, atol=0.5 + max(W, H) / 256)
        mask = track.mask(frame)
        assert mask.shape == size and mask.dtype == np.bool_
        np.testing.assert_array_equal(track.boxes[frame], mask_to_box(mask))
        x0, y0, x1, y1 = track.boxes[frame].astype(int)
        assert mask[y0:y1, x0:x1].mean() > 0.99  # corners are rounded where the picture is larger than the mask


@pytest.mark.parametrize("size", [(60, 120), (120, 60), (63, 127), (33, 64)])
def test_the_way_to_the_segmenter_and_back_is_the_identity(size, processor):
    """A bright box in a picture, resized as the segmenter sees it and taken as its mask, is found where it was."""
    H, W = size
    frame = np.zeros((H, W, 3), dtype=np.uint8)
    x0, y0, x1, y1 = W // 4, H // 3, W // 2, 3 * H // 4
    frame[y0:y1, x0:x1] = 255
    seen = segmenter_pixels(frame, 256).mean(0)
    logits = torch.where(seen > (seen.max() + seen.min()) / 2, 8.0, -8.0)
    output = output_of(processor, logits[None, None], request=request_of(1, [0], size))
    (track,) = processor.post_process_grounding(output)[0]
    np.testing.assert_allclose(track.boxes[0], [x0, y0, x1, y1], atol=1)


def test_result_of_two_objects_on_three_frames(processor):
    masks = torch.stack([box_logits([(0, 0, 0.5, 0.5)] * 3, 64), box_logits([(0.5, 0.5, 1, 1)] * 3, 64)])
    masks[0, 1] = -8  # nothing of it on frame 1, though it counts as there
    object_logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, -0.5, torch.nan]])
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.25, torch.nan]])
    answer = "<p> a ring </p> [BOX] [SEG] and <p> a star </p> [BOX] [SEG] ."
    request = request_of(3, [0, 2])
    output = output_of(processor, masks, answer, request, object_logits, scores)
    output.warnings = [["a token was dropped."]]
    (result,) = processor.post_process_grounding(output)
    assert result.text == "a ring and a star." and [track.phrase for track in result] == ["a ring", "a star"]
    assert [track.span for track in result] == [(0, 6), (11, 17)] and [track.id for track in result] == [0, 1]
    assert [track.visible.tolist() for track in result] == [[True, False, True], [True, False, False]]
    assert [[rle is not None for rle in track.rles] for track in result] == [[True, False, True], [True, False, False]]
    assert result[0].boxes[0].tolist() == [0, 0, 32, 24] and result[1].boxes[0].tolist() == [32, 24, 64, 48]
    assert np.isnan(result[0].boxes[1]).all() and np.isnan(result[1].boxes[1:]).all()
    np.testing.assert_allclose(result[0].scores, [0.9, 0.8, 0.7])
    np.testing.assert_allclose(result[1].scores, [0.5, 0.25, 0])
    assert result[0].score == 0.5 and result.timings == {"generate": 0.25}
    assert (result.query, result.size, result.fps, result.path) == ("the ring", (48, 64), 4.0, None)
    assert result.sampled_frames == [0, 2] and result.timestamps.tolist() == [0, 0.25, 0.5]
    seen = "The clip has 3 frames; the language model saw 2 of them."
    assert result.warnings == ["a token was dropped.", seen]


@pytest.mark.parametrize(
    ("task", "phrase"), [("refer", "the ring"), ("box", "the ring"), ("describe", None), ("ask", None)]
)
def test_an_object_without_phrase(task, phrase, processor):
    masks = box_logits([(0, 0, 1, 1)], 16)[None]
    output = output_of(processor, masks, request=request_of(1, [0], task=task))
    (track,) = processor.post_process_grounding(output)[0]
    assert track.phrase == phrase and track.span is None
    named = output_of(processor, masks, "<p> a star </p> [BOX] [SEG]", request=request_of(1, [0], task=task))
    assert processor.post_process_grounding(named)[0][0].phrase == "a star"


@pytest.mark.parametrize("task", ["refer", "ask"])
def test_no_object(task, processor):
    empty = torch.zeros(0, 2, 16, 16)
    output = output_of(processor, empty, "there is no such object .", request_of(2, range(2), task=task))
    (result,) = processor.post_process_grounding(output)
    assert result.objects == [] and result.text == "there is no such object."
    assert result.warnings == ([] if task == "ask" else ["The answer points at no object."])


def test_time_span_of_the_answer_is_in_the_result(processor):
    output = output_of(processor, torch.zeros(0, 4, 16, 16), "frames : ( 1 , 3 )")
    assert processor.post_process_grounding(output)[0].time_span == (0.25, 0.75)


def test_outputs_that_cannot_be_post_processed(processor):
    output = output_of(processor, torch.ones(1, 2, 16, 16))
    output.objects[0][0].mask_logits = None
    with pytest.raises(ValueError, match="went to a mask_sink"):
        processor.post_process_grounding(output)
    output.metadata = None
    with pytest.raises(ValueError, match="no metadata"):
        processor.post_process_grounding(output)


def test_thresholds():
    masks = torch.full((1, 2, 16, 16), 2.0)
    object_logits = torch.tensor([[0.5, 2.0]])
    for thresholds, visible in [({}, [True, True]), ({"visibility_threshold": 1.0}, [False, True])]:
        processor = random_processor_with(TOKENIZER, **thresholds)
        (track,) = processor.post_process_grounding(output_of(processor, masks, object_logits=object_logits))[0]
        assert track.visible.tolist() == visible
    strict = random_processor_with(TOKENIZER, mask_threshold=2.5)
    assert not strict.post_process_grounding(output_of(strict, masks))[0][0].visible.any()


def test_collecting_on_the_way_equals_the_kept_logits(processor, shared_model):
    clips = [random_clip(5), random_clip(3, 37, 61, seed=3)]
    inputs = processor(text=[["the ring", "the star"], ["the red ring"]], videos=clips)
    collector = processor.collector(inputs["metadata"])
    collected = shared_model.ground(**inputs, **say(inputs), mask_sink=collector)
    kept = shared_model.ground(**inputs, **say(inputs))
    for a, b in zip(
        processor.post_process_grounding(collected, collector), processor.post_process_grounding(kept), strict=True
    ):
        assert (a.text, a.query, a.size, len(a)) == (b.text, b.query, b.size, len(b)) and len(a) > 0
        for first, second in zip(a, b, strict=True):
            assert (first.rles, first.score, first.phrase) == (second.rles, second.score, second.phrase)
            np.testing.assert_array_equal(first.boxes, second.boxes)
            np.testing.assert_array_equal(first.scores, second.scores)
            np.testing.assert_array_equal(first.visible, second.visible)


def test_one_frame_of_the_collector_is_that_of_the_track(processor, shared_model):
    inputs = processor(text="the ring", videos=random_clip(4))
    collector = processor.collector(inputs["metadata"])
    output = shared_model.ground(**inputs, **say(inputs), mask_sink=collector)
    (track, *_) = processor.post_process_grounding(output, collector)[0]
    for frame in range(4):
        found = collector.frame_object(0, 0, frame)
        assert (found["id"], found["visible"]) == (0, track.visible[frame])
        assert found["score"] == pytest.approx(track.scores[frame])
        np.testing.assert_array_equal(found["mask"], track.mask(frame))
        assert found["box"] is None if not found["visible"] else found["box"] == track.boxes[frame].tolist()


def test_partial_results(processor, shared_model):
    inputs = processor(text="the ring", videos=random_clip(6), stream=True)
    collector = processor.collector(inputs["metadata"])
    steps = shared_model.ground_iter(**inputs, **say(inputs))
    done = [next(steps) for _ in range(2)]
    for row, masks in done:
        collector(row, masks)
    steps.close()
    (result,) = processor.partial_results(collector)
    reached = {masks.frame_index for _, masks in done}
    assert result.text == "" and result.num_frames == 6 and "Interrupted" in result.warnings[-1]
    for track in result:
        assert set(np.flatnonzero(track.scores)) <= reached and track.score == track.scores.max()
        assert not track.visible[[frame for frame in range(6) if frame not in reached]].any()
