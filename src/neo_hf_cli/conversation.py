"""`neo-hf chat`: one question, or a conversation in a terminal or over lines from a pipe."""

from .options import resolve_image
from .prompts import image_part, video_part

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle
from transformers import StoppingCriteriaList, TextStreamer

from neo_hf import NeoForConditionalGeneration, NeoProcessor
from neo_hf.conversation import CachedConversation

COMMANDS = {
    "/image": "PATH   send an image (path or URL) with the next question",
    "/video": "PATH   send a video (path or URL) with the next question",
    "/clear": "       start over: forget the conversation and the files",
    "/help": "        list the commands",
    "/exit": "        leave; so does Ctrl-D",
}


class RecordingStreamer(TextStreamer):
    """Prints an answer as it is generated, and keeps its tokens, after those of the prompt."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []

    def put(self, value: torch.Tensor):
        self.ids += value.flatten().tolist()
        super().put(value)


@contextmanager
def set_on_interrupt(is_interrupted: threading.Event):
    """
    Ctrl-C sets the event; pressed again, it raises KeyboardInterrupt. Raised at once, wherever the model happens to
    be, the exception can get lost: in a callback from C, Python reports it and goes on.
    """

    def handle(number, frame):
        if is_interrupted.is_set():
            signal.default_int_handler(number, frame)
        is_interrupted.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Conversation(CachedConversation):
    """
    A conversation that is printed, and the files that go with the next question.

    Args:
        media: parts of a message that go with the first question.
        sampling: how the processor samples videos.
    """

    def __init__(
        self,
        model: NeoForConditionalGeneration,
        processor: NeoProcessor,
        system: str,
        media: list[dict],
        sampling: dict,
        max_new_tokens: int,
    ):
        super().__init__(model, processor)
        self.system = {"role": "system", "content": system}
        self.media = media
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens

    def clear(self):
        self.rewind(0)
        self.media = []

    def ask(self, text: str):
        """
        Print the answer to a question while it is generated.

        Raises:
            KeyboardInterrupt: Ctrl-C. The answer so far stays in the conversation; if there is none, the question
                is forgotten and its files go with the next one.
            ValueError: the inputs cannot be prepared. The conversation is as before, without the files.
        """
        media, self.media = self.media, []
        question = {"role": "user", "content": [*media, {"type": "text", "text": text}]}
        start, streamer = len(self.ids), RecordingStreamer(self.processor.tokenizer)
        is_interrupted = threading.Event()

        def should_stop(input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
            return torch.full(input_ids.shape[:1], is_interrupted.is_set(), device=input_ids.device)

        try:
            images = self.add([question] if self.ids else [self.system, question], {"videos_kwargs": self.sampling})
            inputs = self.generate_kwargs(images)
            inputs["stopping_criteria"] = StoppingCriteriaList([should_stop])
            with set_on_interrupt(is_interrupted):
                self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, streamer=streamer)
        except KeyboardInterrupt:
            streamer.end()  # prints what it holds back
            if len(streamer.ids) > len(self.ids):
                self.end_answer(streamer.ids)
            else:
                self.rewind(start)
                self.media = media
            raise
        except BaseException:
            self.rewind(start)
            raise
        self.end_answer(streamer.ids)
        if is_interrupted.is_set():
            raise KeyboardInterrupt


def say(text: str):
    """What is not an answer goes to standard error, so that answers can be piped on."""
    print(text, file=sys.stderr, flush=True)


def converse(conversation: Conversation):
    """Answer line by line, from a terminal or a pipe, until the input ends."""
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        say("Ask a question. /help lists the commands.")
    for line in terminal_lines() if in_terminal else sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "/exit":
            return
        try:
            if re.fullmatch("/[A-Za-z]*", command):  # and not a path
                run_command(conversation, command, argument.strip())
            elif command:
                conversation.ask(line.strip())
        except KeyboardInterrupt:
            if not in_terminal:
                raise
            say("(stopped)")
        except (ValueError, OSError, ImportError) as error:
            say(f"error: {error}")


def run_command(conversation: Conversation, command: str, argument: str):
    if command in ("/image", "/video"):
        if not argument:
            raise ValueError(f"{command} needs a path or URL.")
        file = unquote(argument)
        conversation.media.append(image_part(resolve_image(file)) if command == "/image" else video_part(file))
        say(f"{file} goes with the next question.")
    elif command == "/clear":
        conversation.clear()
        say("The conversation starts over.")
    elif command == "/help":
        say("\n".join(f"{name} {description}" for name, description in COMMANDS.items()))
    else:
        raise ValueError(f"there is no command {command}. /help lists the commands.")


def unquote(argument: str) -> str:
    """A path as typed, spaces included, or as a terminal writes a file that is dropped on it: quoted or escaped."""
    try:
        words = shlex.split(argument)
    except ValueError:  # a quotation mark or backslash of the name's own
        words = []
    return os.path.expanduser(words[0] if len(words) == 1 else argument)


class CommandCompleter(Completer):
    """Completes commands, and paths after those that take one."""

    paths = PathCompleter(expanduser=True)

    def get_completions(self, document, complete_event):
        command, space, argument = document.text_before_cursor.partition(" ")
        if not space:
            yield from (Completion(f"{name} ", -len(command)) for name in COMMANDS if name.startswith(command))
        elif command in ("/image", "/video"):
            yield from self.paths.get_completions(Document(argument), complete_event)


def open_history() -> History:
    """Earlier questions, in a file of the user's state folder (XDG) where it can be written."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "neo-hf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chat_history").touch()
    except OSError:
        return InMemoryHistory()
    return FileHistory(folder / "chat_history")


def terminal_lines() -> Iterator[str]:
    """Lines edited in the terminal, until Ctrl-D. Ctrl-C drops a line."""
    session: PromptSession[str] = PromptSession(
        "> ",
        history=open_history(),
        completer=CommandCompleter(),
        complete_style=CompleteStyle.READLINE_LIKE,
        output=create_output(always_prefer_tty=True),  # standard error where answers go to a file
    )
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
