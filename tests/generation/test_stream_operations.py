"""Any sequence of operations on streams answers as one prompt of the same content; in float64, where no scores tie."""

import itertools

import numpy as np
import pytest
import torch
from helpers import num_examples, random_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule
from PIL import Image

from neo_hf import NeoConfig, NeoProcessor, load_nano
from neo_hf.streaming import NeoStream
from neo_hf.video_processing_neo import NeoVideoProcessor

pytestmark = pytest.mark.slow

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
TEXTS = st.sampled_from(["", "\n", " ", "Look", "\n\nNow?", "red\n", "a circle. "])


def tiny_parts():
    """A random model of one width and two layers, and a processor of images of a few tokens, with NEO-nano's words."""
    nano, processor = load_nano()
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 2,
    }
    text |= {"num_key_value_heads": 1, "num_pre_buffer_layers": 1, "vocab_size": nano.config.text_config.vocab_size}
    ids = {
        name: getattr(nano.config, name) for name in ("image_token_id", "image_start_token_id", "image_end_token_id")
    }
    model = random_model(NeoConfig(text_config=text, vision_config={"hidden_size": 8}, **ids)).double()
    with torch.no_grad():  # scores far apart, so that answers depend on all that was shown
        model.get_output_embeddings().weight.mul_(20)
    video_processor = NeoVideoProcessor(min_pixels=1024, max_pixels=4096)
    return model, NeoProcessor(processor.image_processor, processor.tokenizer, video_processor)


MODEL, PROCESSOR = tiny_parts()
END = PROCESSOR.tokenizer.convert_tokens_to_ids("<|im_end|>")
RANDOM = np.random.default_rng(0)
FRAMES = [
    Image.fromarray(RANDOM.integers(0, 256, (32 * rows, 32 * columns, 3), dtype=np.uint8))
    for rows, columns in ((1, 1), (1, 2), (2, 1), (2, 2))
]


class Expected:
    """A stream and its content: the ids up to the last answer that was kept, the text since, and all frames."""

    def __init__(self, stream, text, ids=(), frames=(), seconds=0):
        self.stream, self.text, self.ids, self.frames, self.seconds = stream, text, list(ids), list(frames), seconds

    def fork(self):
        return Expected(self.stream.fork(), self.text, self.ids, self.frames, self.seconds)

    def answer(self, question):
        """The ids of prompt and answer, generated whole."""
        text = f"{self.text}{question}<|im_end|>\n<|im_start|>assistant\n"
        pixels = PROCESSOR.video_processor([[frame] for frame in self.frames], return_tensors="pt")
        num_closed = len(self.frames) - text.count("<image>")
        for index in range(num_closed, len(self.frames)):
            text = text.replace("<image>", PROCESSOR.replace_image_token(pixels, index), 1)
        ids = torch.tensor([self.ids + PROCESSOR.tokenizer(text, add_special_tokens=False)["input_ids"]])
        images = {key: pixels[key] for key in ("pixel_values", "image_grid_hw")}
        output = MODEL.generate(
            ids, attention_mask=torch.ones_like(ids), **images, **GREEDY, pad_token_id=END, eos_token_id=END
        )
        return output[0].tolist(), ids.shape[1]


class StreamOperations(RuleBasedStateMachine):
    streams = Bundle("streams")

    @initialize(target=streams, system=st.sampled_from([None, "Be brief."]), frame=st.sampled_from(FRAMES))
    def start(self, system, frame):
        stream = NeoStream(MODEL, PROCESSOR, system)
        turn = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        expected = Expected(stream, f"{turn}<|im_start|>user\n")
        self.add_frame(expected, frame, None)
        return expected

    @rule(expected=streams, frame=st.sampled_from(FRAMES), wait=st.sampled_from([None, 0, 0.5, 61]))
    def add_frame(self, expected, frame, wait):
        timestamp = None
        if wait is not None:
            timestamp = expected.seconds = expected.seconds + wait
            expected.text += f"[{int(timestamp // 60):02}:{timestamp % 60:05.2f}]:"
        expected.stream.add_frame(frame, timestamp)
        expected.text += "<image>\n"
        expected.frames.append(frame)

    @rule(expected=streams, text=TEXTS)
    def add_text(self, expected, text):
        expected.stream.add_text(text)
        expected.text += text

    @rule(expected=streams, question=TEXTS, keep=st.booleans())
    def ask(self, expected, question, keep):
        ids, start = expected.answer(question)
        answer = "".join(expected.stream.ask(question, keep=keep, **GREEDY))
        assert answer == PROCESSOR.tokenizer.decode(ids[start:], skip_special_tokens=True)
        if keep:
            expected.ids = ids if ids[-1] == END else [*ids, END]
            expected.text = "\n<|im_start|>user\n"

    @rule(expected=streams, pieces=st.integers(0, 2))
    def drop_an_answer(self, expected, pieces):
        answer = expected.stream.ask("Now?", **GREEDY)
        list(itertools.islice(answer, pieces))
        answer.close()

    @rule(target=streams, expected=streams)
    def fork(self, expected):
        return expected.fork()

    @rule(expected=streams, layer=st.integers(0, 1), call=st.sampled_from(["frame", "ask", "keep"]))
    def fail(self, expected, layer, call):
        """In the middle of the model, as when memory runs out."""

        def refuse(module, args):
            raise RuntimeError("out of memory")

        hook = MODEL.model.language_model.layers[layer].register_forward_pre_hook(refuse)
        try:
            if call == "frame":
                with pytest.raises(RuntimeError, match="out of memory"):
                    expected.stream.add_frame(FRAMES[0])
            else:
                with pytest.raises(RuntimeError, match="out of memory"):
                    list(expected.stream.ask("Now?", keep=call == "keep", **GREEDY))
        finally:
            hook.remove()

    @rule(expected=streams)
    def refuse(self, expected):
        with pytest.raises(ValueError, match="Cannot read the image"):
            expected.stream.add_frame("nowhere.png")
        with pytest.raises(ValueError, match="no_such_argument"):
            list(expected.stream.ask("Now?", no_such_argument=1))


TestStreamOperations = StreamOperations.TestCase
TestStreamOperations.settings = settings(max_examples=num_examples(500), stateful_step_count=8, deadline=None)
