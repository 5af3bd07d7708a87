"""From token ids to text as it comes: characters whole, stop strings never shown.

A token may end inside a character, and tokenizers write some tokens differently after others.
So ids are decoded in a window that starts one finished piece back, and text is given out only when
it ends in a whole character. Text that could be the beginning of a stop string is held back until
that is decided. What continues a raw prompt is decoded after the prompt's last tokens: many
tokenizers drop the space before the first word of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from models.errors import InputError

if TYPE_CHECKING:
    from runtime.engine import Engine, Request

BROKEN = "\N{REPLACEMENT CHARACTER}"
PATIENCE = 8  # tokens that may end in a broken character before those ahead of it are shown
CUT = 3  # tokens at most that an unfinished character of up to four bytes has
PROMPT_TOKENS = 8  # of a raw prompt, before what continues it


def prompt_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Ids of a prompt. InputError for text that no tokenizer takes."""
    if whole(text) != text:
        raise InputError(
            "the text has half of a surrogate pair (broken UTF-8 or UTF-16); send whole characters"
        )
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


def whole(text: str) -> str:
    """The text with a ? for every half of a surrogate pair, which UTF-8 cannot say."""
    return text.encode(errors="replace").decode()


class TextStream:
    """The text of one generation. `stopped` once a stop string has come.

    `after`: ids of the raw prompt that is continued; their text is not given out.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...] = (),
        *,
        special: bool = False,
        after: Sequence[int] = (),
    ):
        self.tokenizer, self.stop, self.special = tokenizer, stop, special
        self.stopped = False
        self._ids = list(after[-PROMPT_TOKENS:])
        while self._decode(0, len(self._ids)).startswith(BROKEN):  # a character cut in two
            del self._ids[0]
        if self._decode(0, len(self._ids)).endswith(BROKEN):  # one that the answer may complete
            self._ids = []
        self._prompt = len(self._ids)
        self._begin = 0  # window of ids; those before _shown are out as text
        self._shown = self._prompt
        self._held = ""

    @property
    def count(self) -> int:
        """Tokens pushed so far."""
        return len(self._ids) - self._prompt

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._ids.append(token)
        end = len(self._ids)
        before = self._decode(self._begin, self._shown)
        now = self._decode(self._begin, end)
        if now.endswith(BROKEN):
            if end - self._shown < PATIENCE:
                return ""
            # the model may have meant the mark itself: show what comes before the last one, and
            # cut where text is shortest, which is between characters
            ends = range(end - 1, end - 1 - CUT, -1)
            end = min(ends, key=lambda stop: len(self._decode(self._begin, stop)))
            now = self._decode(self._begin, end)
        self._begin, self._shown = self._shown, end
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """What is left at the end."""
        before = self._decode(self._begin, self._shown)
        rest = self._decode(self._begin, len(self._ids))[len(before) :]
        text = "" if self.stopped else self._release(rest) + self._held
        self._held = ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        text: str = self.tokenizer.decode(
            self._ids[start:stop],
            skip_special_tokens=not self.special,
            clean_up_tokenization_spaces=False,
        )
        return text

    def _release(self, text: str) -> str:
        """Text that cannot be part of a stop string any more."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def pieces(
    engine: Engine,
    request: Request,
    stream: TextStream,
    lock: AbstractContextManager[Any] | None = None,
) -> Iterator[str]:
    """The text of one request as it comes, stepping until it has ended or its stop string came.

    Threads that share an engine give the `lock` under which each advances the whole batch.
    """
    held = lock or nullcontext()
    while request.reason is None:
        with held:
            if request.reason is None:
                engine.step()
        while stream.count < len(request.tokens) and not stream.stopped:
            yield stream.push(request.tokens[stream.count])
        if stream.stopped:
            engine.cancel(request)
    yield stream.finish()
