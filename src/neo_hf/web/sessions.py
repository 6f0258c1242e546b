"""What each person has: a conversation and a live stream. Their number and their memory are bounded."""

import copy
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from neo_hf import NeoForConditionalGeneration, NeoProcessor
from neo_hf.web.conversation import Conversation
from neo_hf.web.live import Live

MIN_IDLE_SECONDS = 60  # before someone has to make room for the next


@dataclass
class Session:
    """
    One person's conversation and live stream.

    lock: held while the conversation is used.
    is_stopping: tells an answer that is being written to end.
    """

    conversation: Conversation
    live: Live
    used: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_stopping: threading.Event = field(default_factory=threading.Event)


class Sessions:
    """
    The sessions of everyone who uses one model.

    Args:
        max_sessions: people at the same time. When all places are taken, whoever has been idle longest makes room.
        max_tokens: tokens that a conversation, and likewise a live stream, can hold.
        idle_seconds: a session that was not used for so long is freed.
    """

    def __init__(
        self,
        model: NeoForConditionalGeneration,
        processor: NeoProcessor,
        max_sessions: int = 16,
        max_tokens: int = 8192,
        idle_seconds: float = 1800,
    ):
        for name, limit in (
            ("max_sessions", max_sessions),
            ("max_tokens", max_tokens),
            ("idle_seconds", idle_seconds),
        ):
            if limit <= 0:
                raise ValueError(f"{name} must be positive, got {limit}.")
        self.model = model
        self.processor = copy.copy(processor)
        self.processor.allowed_media = ["data"]  # what people send is read by `media.py` and never looked up
        self.max_sessions = max_sessions
        self.max_tokens = max_tokens
        self.idle_seconds = idle_seconds
        self._sessions: dict[str, Session] = {}
        self._freed: deque[str] = deque(maxlen=1000)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, key: str) -> Session | None:
        """The session of `key`, if it is there."""
        return self._sessions.get(key)

    def get(self, key: str) -> Session:
        """
        The session of `key`, a secret of its owner. It is made if it is not there.

        Raises:
            ValueError: all places are taken.
        """
        with self._lock:
            session = self._sessions.get(key)
            if session is None:
                self._make_room()
                session = self._sessions[key] = Session(self.new_conversation(), self.new_live())
            session.used = time.monotonic()
            return session

    def was_freed(self, key: str) -> bool:
        """Whether the session of `key` was freed, once."""
        with self._lock:
            if is_freed := key in self._freed:
                self._freed.remove(key)
            return is_freed

    def new_conversation(self) -> Conversation:
        return Conversation(self.model, self.processor, self.max_tokens)

    def new_live(self) -> Live:
        return Live(self.model, self.processor, self.max_tokens)

    def free_idle(self):
        """Free the sessions that were not used for `idle_seconds`."""
        with self._lock:
            for key in [key for key, session in self._sessions.items() if self._idle(session) > self.idle_seconds]:
                self._free(key)

    def num_bytes(self) -> int:
        """Memory that all sessions hold now."""
        sessions = list(self._sessions.values())
        return sum(session.conversation.num_bytes + session.live.num_bytes for session in sessions)

    def max_bytes(self) -> int:
        """
        The most that all sessions can hold: keys and values with an eighth of spare room, and the pixels of
        conversations. While answers are written, their forks of live streams and the conversations of comparisons come
        on top.
        """
        return int(
            self.max_sessions * self.max_tokens * (2 * 9 / 8 * bytes_per_token(self.model) + self._pixel_bytes())
        )

    def _pixel_bytes(self) -> int:
        vision = self.model.config.vision_config
        return 4 * 3 * (vision.patch_size * vision.spatial_merge_size) ** 2

    def _make_room(self):
        if len(self._sessions) < self.max_sessions:
            return
        key = max(self._sessions, key=lambda key: self._idle(self._sessions[key]))
        if self._idle(self._sessions[key]) < MIN_IDLE_SECONDS:
            raise ValueError(f"All {self.max_sessions} places are taken. Try again in a few minutes.")
        self._free(key)

    def _free(self, key: str):
        del self._sessions[key]
        self._freed.append(key)

    def _idle(self, session: Session) -> float:
        return 0.0 if session.lock.locked() else time.monotonic() - session.used


def bytes_per_token(model: NeoForConditionalGeneration) -> int:
    """Memory of a token's keys and values: a key has the channels of T, and as many for H and W together."""
    text = model.config.text_config
    channels = text.num_key_value_heads * 3 * text.head_dim
    return text.num_hidden_layers * channels * model.dtype.itemsize
