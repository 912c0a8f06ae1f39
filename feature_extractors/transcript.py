# SPDX-License-Identifier: Apache-2.0
"""Data classes of what is said in a clip: words and their times, as a speech recogniser hears them."""

from dataclasses import dataclass, replace
from typing import Any

DOUBTFUL = 0.5
"""Transcripts whose words have a lower probability on average are probably wrong (docs/transcripts.md)."""


@dataclass(frozen=True)
class Word:
    """A recognised word.

    Attributes:
        text: The word, with its punctuation.
        start: Start in seconds from the start of the clip.
        end: End in seconds.
        probability: Probability that the recogniser gives it, in [0, 1]; None if it gives none.
    """

    text: str
    start: float
    end: float
    probability: float | None = None


@dataclass(frozen=True)
class Transcript:
    """What a recogniser heard in a clip.

    Attributes:
        text: The text; "" if there is no speech.
        words: Its words in order; empty if the recogniser gives no times.
        language: Code of the language; None if the recogniser does not tell.
        model: Name of the recogniser.
    """

    text: str
    words: tuple[Word, ...]
    language: str | None
    model: str

    @property
    def doubt(self) -> str | None:
        """Why the text is probably wrong, as in a language that the recogniser does not know.

        None if the words are probable enough, or if the recogniser gives no probabilities.
        """
        given = [word.probability for word in self.words if word.probability is not None]
        mean = sum(given) / len(given) if given else 1.0
        return f"doubtful, mean probability of a word {mean:.2f}" if mean < DOUBTFUL else None

    def places(self) -> list[tuple[int, int]]:
        """Where each word is in the text: its first character, and the one after its last."""
        places, begin = [], 0
        for word in self.words:
            begin = self.text.index(word.text, begin)
            places.append((begin, begin + len(word.text)))
            begin += len(word.text)
        return places

    def between(self, start: float, end: float) -> "Transcript":
        """The words whose middle is in a window, with times from the start of the window in seconds."""
        chosen = [
            (place, word)
            for place, word in zip(self.places(), self.words, strict=True)
            if start <= (word.start + word.end) / 2 < end
        ]
        text = self.text[chosen[0][0][0] : chosen[-1][0][1]] if chosen else ""
        words = (
            replace(word, start=max(word.start - start, 0.0), end=min(word.end, end) - start)
            for _, word in chosen
        )
        return replace(self, text=text, words=tuple(words))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Transcript":
        """The transcript that `dataclasses.asdict` made plain."""
        return cls(**content | {"words": tuple(Word(**word) for word in content["words"])})
