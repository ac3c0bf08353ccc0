"""From the tokens of an answer to its text, piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence

from smollm2.pretrained.tokenizer import Tokenizer


class TextPieces:
    """The text of an answer as its tokens come, up to one of `ends` or a text of `stop`, not included.

    A character whose bytes are spread over several tokens is given when it is complete. Text that may be the
    beginning of a stop text is held back until that is decided. finish: None, then "stop".
    """

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.ends, self.stop = tokenizer, frozenset(ends), tuple(stop)
        self.finish: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def take(self, token: int) -> str:
        """What is ready after the next token."""
        if token in self.ends:
            self.finish = "stop"
            return self.rest()
        self._held += self._decoder.decode(self.tokenizer.token_bytes(token))
        found = [self._held.index(text) for text in self.stop if text in self._held]
        if found:
            self.finish = "stop"
            ready = min(found)
        else:
            open_ends = (size for text in self.stop for size in self._begun(text))
            ready = len(self._held) - max(open_ends, default=0)
        piece, self._held = self._held[:ready], self._held[ready:]
        return piece

    def rest(self) -> str:
        """What was held back, where no more tokens come."""
        rest, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return rest

    def _begun(self, text: str) -> Iterator[int]:
        """How many characters of a stop text may stand at the end."""
        return (size for size in range(1, len(text)) if self._held.endswith(text[:size]))


class TextStream(Iterator[str]):
    """Pieces of text, one for every token, an empty one if nothing is ready.

    tokens: those that were drawn so far, the end included. finish: None, then "stop", or "length" where the
    tokens that were allowed came to their end.
    """

    def __init__(self, runs: Iterable[Sequence[int]], pieces: TextPieces) -> None:
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._pieces = self._read(runs, pieces)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation where it is."""
        self._pieces.close()

    def _read(self, runs: Iterable[Sequence[int]], pieces: TextPieces) -> Generator[str, None, None]:
        for run in runs:
            for token in run:
                self.tokens.append(token)
                piece = pieces.take(token)
                if pieces.finish:  # before the last piece, whose reader may want no more
                    self.finish = pieces.finish
                    yield piece
                    return
                yield piece
        self.finish = "length"
        if rest := pieces.rest():
            yield rest
