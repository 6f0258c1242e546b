"""The page: Chat, Live, What it sees, Compare, and the same as functions for `gradio_client`."""

import base64
import copy
import html
import io
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from neo_hf import NeoForConditionalGeneration, NeoProcessor
from neo_hf.loading import EXAMPLE_IMAGE
from neo_hf.web.conversation import Conversation, Settings, Turn
from neo_hf.web.media import MAX_FILE_BYTES, Upload, delete_old_files, read_uploads
from neo_hf.web.sessions import Session, Sessions

HERE = Path(__file__).parent
EXAMPLES: dict[str, tuple[str, list[Path]]] = {  # label: (question, files)
    "An image": ("Describe the picture.", [EXAMPLE_IMAGE]),
    "Two images": ("What changed?", [HERE / "examples" / "before.png", HERE / "examples" / "after.png"]),
    "A video": ("Which way does the red circle move?", [HERE / "examples" / "moving.webm"]),
    "A number": ("What number is written?", [HERE / "examples" / "number.png"]),
}
QUEUE_SIZE = 64
ANSWERS_AT_ONCE = 4
MIN_UPDATE_SECONDS = 0.05  # between two updates of an answer on the page
SWEEP_SECONDS = 10
KEEP_UPLOADS_SECONDS = 600  # after they were sent or last used
LIVE_ANSWER_TOKENS = 256


class Page:
    """
    The page as Gradio Blocks. Uploads go to a folder of their own, which disappears with the process.

    Args:
        models: model and processor by name. The first is the one to chat with; all of them can be compared.
        max_sessions, max_tokens, idle_seconds: see `Sessions`.
        frame_side: longer side in pixels to which the page shrinks live frames.

    Raises:
        ValueError: a limit is not positive.
    """

    def __init__(
        self,
        models: Mapping[str, tuple[NeoForConditionalGeneration, NeoProcessor]],
        max_sessions: int = 16,
        max_tokens: int = 8192,
        idle_seconds: float = 1800,
        frame_side: int = 448,
    ):
        self.models = {
            name: Sessions(*parts, max_sessions, max_tokens, idle_seconds) for name, parts in models.items()
        }
        name, self.sessions = next(iter(self.models.items()))
        self.frame_side = frame_side
        self._drawn_model = _with_same_weights(self.sessions.model)
        self._uploads = tempfile.TemporaryDirectory(prefix="neo-hf-web-")
        os.environ["GRADIO_TEMP_DIR"] = self._uploads.name
        with gr.Blocks(title=f"NEO: {name}", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# {html.escape(name)}", elem_id="title")
            self._key = gr.State("")
            with gr.Tabs():
                with gr.Tab("Chat"):
                    self._add_chat()
                with gr.Tab("Live"):
                    self._add_live()
                with gr.Tab("What it sees"):
                    self._add_drawing()
                with gr.Tab("Compare"):
                    self._add_compare()
            gr.Markdown(
                f"Up to {max_sessions} people at once, each with {max_tokens:,} tokens of chat and {max_tokens:,} of "
                f"live video: at most {_size(self.sessions.max_bytes())} in all. What was not used for "
                f"{idle_seconds / 60:g} minutes is freed, files after {KEEP_UPLOADS_SECONDS // 60} minutes.",
                elem_id="limits",
            )
            self._restore_on_load()
            self._add_api()
        self.blocks.queue(max_size=QUEUE_SIZE, default_concurrency_limit=ANSWERS_AT_ONCE)

    def launch(self, **launch_kwargs: Any) -> tuple[Any, str, str]:
        """Serve the page. `launch_kwargs` are those of Gradio's `launch()`: `server_name`, `auth`, `root_path`, ..."""
        threading.Thread(target=self._sweep, daemon=True).start()
        theme = gr.themes.Default(
            primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ).set(body_text_color_subdued="*neutral_600", input_placeholder_color="*neutral_500")  # Gradio's are too light
        settings: dict[str, Any] = {
            "theme": theme,
            "css_paths": HERE / "page.css",
            "head": f"<script>{(HERE / 'session.js').read_text()}</script>",
            "max_file_size": MAX_FILE_BYTES,
            "allowed_paths": [str(file) for _, files in EXAMPLES.values() for file in files],
            "share": False,
            "ssr_mode": False,
            "footer_links": ["settings", "api"],
        }
        return self.blocks.launch(**(settings | launch_kwargs))

    def _read(self, files: list[str]) -> list[Upload]:
        return read_uploads(files, self._uploads.name)

    def _sweep(self):
        while True:
            time.sleep(SWEEP_SECONDS)
            self.sessions.free_idle()
            delete_old_files(Path(self._uploads.name), KEEP_UPLOADS_SECONDS)

    # Chat

    def _add_chat(self):
        self._chatbot = gr.Chatbot(
            label="Conversation",
            height="60vh",
            buttons=["copy", "copy_all"],
            feedback_options=None,
            placeholder="Ask about images, videos or text.",
            elem_id="conversation",
        )
        self._status = gr.Markdown(elem_id="chat-status")
        message = self._message = _add_question("Ask a question. Drop, paste or attach images and videos.", "question")
        with gr.Row(elem_id="examples"):
            for label, (question, files) in EXAMPLES.items():
                value = {"text": question, "files": [str(file) for file in files]}
                button = gr.Button(label, size="sm", min_width=80)
                button.click(lambda value=value: value, outputs=message, queue=False, api_visibility="private")
            start_over = gr.Button("Start over", size="sm", min_width=80)
        with gr.Accordion("Camera", open=False):
            camera = self._camera = gr.Image(
                sources=["webcam"],
                webcam_options=gr.WebcamOptions(mirror=False),  # text in a photo has to be readable
                type="filepath",
                label="A photo goes with the next question",
                elem_id="camera",
            )
        with gr.Accordion("Settings", open=False):
            settings = _add_settings(self.sessions)

        inputs = [self._key, message, camera, *settings]
        outputs = [self._chatbot, message, camera, self._status]
        private = {  # the place in the queue, and the time, where the status will be
            "api_visibility": "private",
            "show_progress": "minimal",
            "show_progress_on": self._status,
            "concurrency_id": "answers",
        }
        message.submit(self._chat, inputs, outputs, concurrency_limit=ANSWERS_AT_ONCE, **private)
        self._chatbot.retry(self._retry, [self._key, *settings], outputs, **private)
        undo = {"queue": False, "api_visibility": "private"}
        message.stop(self._stop, [self._key], queue=False, api_visibility="private")
        self._chatbot.undo(self._undo, [self._key], outputs, **undo)
        for event in (start_over.click, self._chatbot.clear):
            event(self._start_over, [self._key], outputs, **undo)

    def _chat(self, key: str, message: dict, camera: str | None, *settings) -> Iterator[dict]:
        files = [*message["files"], *([camera] if camera else [])]
        text = message["text"].strip()
        yield gr.skip()  # Gradio empties the outputs of a generator that yields nothing
        if not text and not files:
            return
        session = self._session_of(key)
        if session is None:
            return
        if not session.lock.acquire(blocking=False):
            gr.Warning("The last answer is still being written. Stop it first.")
            return
        try:
            pieces = session.conversation.ask(text, self._read(files), _settings(*settings))
            yield from self._write(session, pieces)
        except (ValueError, OSError) as error:
            gr.Warning(html.escape(str(error)), title="The question was not asked")
            yield {self._status: _describe(session.conversation)}
        finally:
            session.lock.release()

    def _retry(self, key: str, *settings) -> Iterator[dict]:
        yield gr.skip()
        session = self.sessions.find(key)
        if session is None or not session.conversation.turns or not session.lock.acquire(blocking=False):
            return
        try:
            yield from self._write(session, session.conversation.retry(_settings(*settings)))
        finally:
            session.lock.release()

    def _write(self, session: Session, pieces: Iterator[str]) -> Iterator[dict]:
        """Show an answer while it is written."""
        conversation = session.conversation
        session.is_stopping.clear()
        try:
            yield {
                self._chatbot: _transcript(conversation),
                self._message: gr.MultimodalTextbox(value={"text": "", "files": []}, submit_btn=False, stop_btn=True),
                self._camera: None,
                self._status: "",
            }
            updated = time.monotonic()
            for _ in pieces:
                if session.is_stopping.is_set():
                    break
                if time.monotonic() - updated > MIN_UPDATE_SECONDS:
                    yield {self._chatbot: _transcript(conversation)}
                    updated = time.monotonic()
        except Exception as error:
            gr.Warning(html.escape(str(error)), title="The answer could not be written")
        finally:
            pieces.close()  # type: ignore[attr-defined]
            session.used = time.monotonic()
        yield {
            self._chatbot: _transcript(conversation),
            self._message: gr.MultimodalTextbox(submit_btn=True, stop_btn=False),
            self._status: _describe(conversation),
        }

    def _stop(self, key: str):
        if session := self.sessions.find(key):
            session.is_stopping.set()

    def _undo(self, key: str) -> dict:
        session = self.sessions.find(key)
        if session is None or not session.conversation.turns or not session.lock.acquire(blocking=False):
            return gr.skip()
        try:
            turn = session.conversation.undo()
        finally:
            session.lock.release()
        return self._shown(session) | {self._message: {"text": turn.question, "files": []}}

    def _start_over(self, key: str) -> dict:
        if session := self.sessions.find(key):
            session.is_stopping.set()
            with session.lock:
                session.conversation = self.sessions.new_conversation()
        return self._shown(session)

    def _shown(self, session: Session | None) -> dict:
        if session is None:
            return {self._chatbot: [], self._status: ""}
        return {
            self._chatbot: _transcript(session.conversation),
            self._message: gr.MultimodalTextbox(submit_btn=True, stop_btn=False),
            self._status: _describe(session.conversation),
        }

    def _session_of(self, key: str) -> Session | None:
        """The session of a key, or `None` and a message on the page."""
        if self.sessions.was_freed(key):
            gr.Info("The conversation was idle and has been freed, so this question starts a new one.")
        try:
            return self.sessions.get(key)
        except ValueError as error:
            gr.Warning(str(error))
            return None

    def _restore_on_load(self):
        """After a reload, show the conversation again. An answer that was being written is kept as far as it got."""
        from_browser = gr.Textbox(visible=False)

        def restore(key: str) -> dict:
            session = self.sessions.find(key)
            if session is not None:
                session.is_stopping.set()
                with session.lock:
                    return self._shown(session) | {self._key: key}
            return self._shown(None) | {self._key: key}

        self.blocks.load(
            restore,
            [from_browser],
            [self._key, self._chatbot, self._message, self._status],
            js="() => neoSession()",
            queue=False,
            api_visibility="private",
        )

    # Live

    def _add_live(self):
        # Called by live.js. Frames do not pass through the queue: each page has at most one under way.
        def show_frame(frame: dict) -> dict:
            try:
                session = self.sessions.get(frame["key"])
                session.used = time.monotonic()
                return session.live.add_frame(
                    frame["image"], frame["timestamp"], frame["max_tokens"], frame["questions"]
                )
            except (ValueError, RuntimeError) as error:
                return {"error": str(error)}

        def get_status(key: str) -> dict:
            session = self.sessions.find(key)
            return session.live.status() if session else {}

        def forget(key: str) -> dict:
            self._forget_live(key)
            return {}

        gr.HTML(
            html_template=(HERE / "live.html").read_text(),
            css_template=(HERE / "live.css").read_text(),
            js_on_load=(HERE / "live.js").read_text(),
            server_functions=[show_frame, get_status, forget],
            apply_default_css=False,
            elem_id="live",
            side=self.frame_side,
            budget=self.sessions.max_tokens,
        )
        question = gr.Textbox(
            label="Question about what has been shown",
            placeholder="Ask at any moment",
            submit_btn=True,
            elem_id="live-question",
        )
        answer = gr.Textbox(label="Answer", interactive=False, lines=2, elem_id="live-answer")
        question.submit(
            self._live_ask,
            [self._key, question],
            answer,
            api_visibility="private",
            show_progress="hidden",
            concurrency_limit=ANSWERS_AT_ONCE,
            concurrency_id="answers",
        )

    def _forget_live(self, key: str):
        if session := self.sessions.find(key):
            session.live = self.sessions.new_live()

    def _live_ask(self, key: str, question: str) -> Iterator[Any]:
        yield gr.skip()
        if not question.strip():
            return
        session = self.sessions.find(key)
        if session is None or not session.live.status()["shown"]:
            gr.Warning("Nothing has been shown yet: start the camera, a screen or a file first.")
            return
        session.used = time.monotonic()
        started, answer = time.perf_counter(), ""
        try:
            for piece in session.live.ask(question, LIVE_ANSWER_TOKENS):
                answer += piece
                yield answer
            yield f"{answer}  ({time.perf_counter() - started:.2f} s)"
        except ValueError as error:
            gr.Warning(html.escape(str(error)))

    # What it sees

    def _add_drawing(self):
        gr.Markdown("How the model saw the conversation when it wrote a token of an answer. Choose the token:")
        with gr.Row():
            number = gr.Dropdown([], label="Answer", scale=3, min_width=240, elem_id="answer-number")
            layers = self.sessions.model.config.text_config.num_hidden_layers
            names = ["mean of all layers", *(f"layer {n}" for n in range(layers))]
            layer = gr.Dropdown(names, value=names[0], type="index", label="Attention", scale=1, min_width=240)
        tokens = gr.HTML(elem_id="tokens", js_on_load=(HERE / "tokens.js").read_text())
        chosen = gr.State(None)
        figure = gr.HTML(elem_id="figure")

        def list_tokens(key: str, number: int | None) -> dict:
            session = self.sessions.find(key)
            if session is None or number is None or number >= len(session.conversation.turns):
                return {tokens: "", chosen: None, figure: ""}
            return {tokens: _token_buttons(session.conversation, number, None), chosen: None, figure: ""}

        def list_answers(key: str) -> dict:
            session = self.sessions.find(key)
            turns = session.conversation.turns if session else []
            if turns and not turns[-1].stop:
                return gr.skip()  # an answer is being written; what is returned now might arrive after its end
            choices = [(f"{n}. {turn.answer[:80]}", n - 1) for n, turn in enumerate(turns, start=1)]
            last = len(turns) - 1 if turns else None
            return {number: gr.Dropdown(choices=choices, value=last)} | list_tokens(key, last)

        def draw(key: str, number: int | None, token: int | None, layer: int) -> dict:
            session = self.sessions.find(key)
            if session is None or number is None or token is None:
                return gr.skip()
            with session.lock:
                conversation = session.conversation
                if number >= len(conversation.turns):
                    return gr.skip()
                turn = conversation.turns[number]
                if not turn.answer_start <= token < turn.stop:
                    return gr.skip()
                inputs = conversation.inputs_before(token)
                buttons = _token_buttons(conversation, number, token)
            return {figure: self._draw(inputs, layer - 1 if layer else None), tokens: buttons, chosen: token}

        def choose(key: str, number: int | None, layer: int, event: gr.EventData) -> dict:
            return draw(key, number, int(event._data["token"]), layer)

        # Each in one step: of steps that follow one another, Gradio drops those asked for while the last is under way.
        listing = {"queue": False, "api_visibility": "private", "trigger_mode": "always_last"}
        outputs = [tokens, chosen, figure]
        # The status says when an answer has ended. The Chatbot may have shown all of it before.
        self._status.change(list_answers, [self._key], [number, *outputs], **listing)
        number.input(list_tokens, [self._key, number], outputs, **listing)
        drawing = {"concurrency_limit": 1, "concurrency_id": "drawings", "api_visibility": "private"}
        tokens.select(choose, [self._key, number, layer], outputs, trigger_mode="multiple", **drawing)
        layer.change(draw, [self._key, number, chosen, layer], outputs, trigger_mode="always_last", **drawing)

    def _draw(self, inputs: Mapping[str, torch.Tensor], layer: int | None) -> str:
        from neo_hf import visualize  # needs matplotlib

        drawing = visualize.plot_prompt(self._drawn_model, self.sessions.processor, inputs, layer)
        file = io.BytesIO()
        drawing.savefig(file, format="png", dpi=100)
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        text = "Units, T, H and W indices, attention mask, and attention over the images"
        return f'<img src="{source}" alt="{text}">'

    # Compare

    def _add_compare(self):
        message = _add_question("Ask both sides the same", "compare-question")
        names = list(self.models)
        sides: list[list[gr.components.Component]] = []
        outputs: list[gr.components.Component] = []
        with gr.Row():
            for side, letter in enumerate("AB"):
                with gr.Column(min_width=300):
                    name = gr.Dropdown(names, value=names[min(side, len(names) - 1)], label=f"Model {letter}")
                    answer = gr.Textbox(
                        label=f"Answer {letter}",
                        interactive=False,
                        lines=4,
                        buttons=["copy"],
                        elem_id=f"answer-{letter}",
                    )
                    status = gr.Markdown()
                    with gr.Accordion(f"Settings {letter}", open=side == 1 and len(names) == 1):
                        settings = _add_settings(self.sessions)
                    sides.append([name, *settings])
                    outputs += [answer, status]
        size = len(sides[0])

        def compare(message: dict, *chosen) -> Iterator[list]:
            yield [gr.skip()] * len(outputs)
            if not message["text"].strip() and not message["files"]:
                return
            shown = ["", "", "", ""]
            try:
                uploads = self._read(message["files"])
                for side, (name, *settings) in enumerate((chosen[:size], chosen[size:])):
                    conversation = self.models[name].new_conversation()
                    for _ in conversation.ask(message["text"].strip(), uploads, _settings(*settings)):
                        shown[2 * side] = conversation.turns[-1].answer
                        yield shown
                    shown[2 * side] = conversation.turns[-1].answer
                    shown[2 * side + 1] = _describe(conversation)
                    yield shown
            except (ValueError, OSError) as error:
                gr.Warning(html.escape(str(error)), title="The question was not asked")
                yield shown

        message.submit(
            compare,
            [message, *sides[0], *sides[1]],
            outputs,
            api_visibility="private",
            show_progress="minimal",
            show_progress_on=outputs[1],
            concurrency_limit=ANSWERS_AT_ONCE,
            concurrency_id="answers",
        )

    # Functions for gradio_client

    def _add_api(self):
        def ask(
            question: str,
            files: list[gr.FileData],
            request: gr.Request,
            max_pixels: int | None = None,
            num_frames: int | None = None,
            temperature: float = 0.0,
            top_p: float = 1.0,
            max_new_tokens: int = 512,
        ) -> Iterator[str]:
            """Ask about images, videos or text. The conversation goes on with each call; yields the answer so far."""
            settings = _settings(max_pixels, num_frames, temperature, top_p, max_new_tokens)
            with _errors_for_clients():
                session = self.sessions.get(_client_key(request))
                with session.lock:
                    uploads = self._read([file["path"] for file in files])
                    for _ in session.conversation.ask(question, uploads, settings):
                        yield session.conversation.turns[-1].answer
                    session.used = time.monotonic()
                    yield session.conversation.turns[-1].answer

        def start_over(request: gr.Request) -> str:
            """Forget the conversation and the live video."""
            key = _client_key(request)
            self._start_over(key)
            self._forget_live(key)
            return "ok"

        def show_frame(
            image: str,
            timestamp: float,
            request: gr.Request,
            max_tokens: int | None = None,
            questions: list[str] | None = None,
        ) -> dict:
            """
            Show a live frame, a `data:` URI, and answer standing questions. Returns what the cache holds, the answers
            and the times.
            """
            with _errors_for_clients():
                session = self.sessions.get(_client_key(request))
                return session.live.add_frame(image, timestamp, max_tokens, questions or ())

        def ask_live(question: str, request: gr.Request) -> Iterator[str]:
            """Ask about the frames shown so far; yields the answer so far."""
            answer = ""
            with _errors_for_clients():
                session = self.sessions.get(_client_key(request))
                for piece in session.live.ask(question, LIVE_ANSWER_TOKENS):
                    answer += piece
                    yield answer

        for function in (ask, ask_live):
            gr.api(function, concurrency_limit=ANSWERS_AT_ONCE, concurrency_id="answers")
        gr.api(show_frame, concurrency_limit=ANSWERS_AT_ONCE)
        gr.api(start_over, queue=False)


@contextmanager
def _errors_for_clients():
    """Errors whose message `gradio_client` raises again."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def _client_key(request: gr.Request) -> str:
    return f"client-{request.session_hash}"


def _add_question(placeholder: str, elem_id: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        label="Question",
        show_label=False,
        placeholder=placeholder,
        file_count="multiple",
        file_types=["image", "video"],
        sources=["upload"],
        elem_id=elem_id,
    )


def _add_settings(sessions: Sessions) -> list[gr.components.Component]:
    """Settings of a question, in the order of `_settings`."""
    processor = sessions.processor.image_processor
    with gr.Row():
        return [
            gr.Number(
                0,
                label="Pixel budget",
                info=f"per image or frame; 0: the model's own, {processor.max_pixels:,} for images",
                minimum=0,
                precision=0,
                min_width=200,
            ),
            gr.Number(0, label="Frames of a video", info="0: one per second", minimum=0, precision=0, min_width=200),
            gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the most likely token", min_width=200),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="with a temperature", min_width=200),
            gr.Slider(1, 4096, 512, step=1, label="Length", info="tokens of an answer, at most", min_width=200),
        ]


def _settings(max_pixels, num_frames, temperature, top_p, max_new_tokens) -> Settings:
    """From the values of the page, where 0 or nothing stands for the model's own number."""
    return Settings(
        max_pixels=int(max_pixels) if max_pixels else None,
        num_frames=int(num_frames) if num_frames else None,
        temperature=float(temperature),
        top_p=float(top_p),
        max_new_tokens=int(max_new_tokens),
    )


def _transcript(conversation: Conversation) -> list[dict]:
    """The messages of the Chatbot. Images are inside the page: no file is served."""
    messages: list[dict] = []
    for turn in conversation.turns:
        images = "".join(
            f'<img src="{source}" alt="{html.escape(name)}" class="thumbnail">' for name, source in turn.thumbnails
        )
        content = [gr.HTML(images)] if images else []
        if turn.question:
            content.append(_escape(turn.question))
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    return messages


def _escape(text: str) -> str:
    """Markdown in which HTML is shown as it was typed. In code, Markdown does that itself."""
    code = r"(?<!`)(`+)[^`]+\1(?!`)"
    return re.sub(code, lambda found: html.unescape(found[0]), html.escape(text, quote=False))


def _describe(conversation: Conversation) -> str:
    """What the last answer cost."""
    if not conversation.turns:
        return ""
    turn = conversation.turns[-1]
    reused = turn.answer_start - turn.num_computed
    written = turn.stop - turn.answer_start
    return (
        f"Question: {turn.num_computed:,} tokens computed, {reused:,} from the cache. "
        f"Answer: {written:,} tokens in {turn.seconds:.2f} s."
    )


def _token_buttons(conversation: Conversation, number: int, chosen: int | None) -> str:
    turn: Turn = conversation.turns[number]
    tokenizer = conversation.processor.tokenizer
    buttons = []
    for token in range(turn.answer_start, turn.stop):
        text = html.escape(tokenizer.decode([conversation.ids[token]]).replace("\n", "↵"))
        pressed = "true" if token == chosen else "false"
        buttons.append(f'<button type="button" data-token="{token}" aria-pressed="{pressed}">{text}</button>')
    return "".join(buttons)


def _with_same_weights(model: NeoForConditionalGeneration) -> NeoForConditionalGeneration:
    """A model with the same tensors and a configuration of its own: drawing switches the attention implementation."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
