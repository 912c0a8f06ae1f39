# SPDX-License-Identifier: Apache-2.0
"""Clips that a visitor can try, rendered as those of the synthetic corpus are."""

from dataclasses import dataclass
from pathlib import Path

from msa_online.synthetic.plan import CorpusRecipe, PlannedClip


@dataclass(frozen=True)
class Example:
    """A clip with its transcript.

    Attributes:
        title: What it shows, in a few words.
        path: The file.
        text: The transcript.
    """

    title: str
    path: Path
    text: str


SCRIPTS = {  # title: words, and the cues of text, audio and vision on the scale of the labels
    "Everything positive": ("I loved the film, it was wonderful.", (2.6, 2.5, 2.8)),
    "Everything negative": ("The service was terrible.", (-2.8, -2.5, -2.8)),
    "Good words, unhappy voice and face": ("I loved the film, it was wonderful.", (2.6, -2.0, -2.8)),
}


def render_examples(folder: Path) -> list[Example]:
    """Render the examples into a folder; takes a few seconds.

    Raises:
        ModuleNotFoundError: The libraries of the extra `demo` are not installed.
    """
    from msa_online.synthetic.clip import write_clip
    from msa_online.synthetic.face import FaceRenderer

    recipe, renderer = CorpusRecipe(speakers=3, clips=3, seconds=(2.0, 2.2)), FaceRenderer()
    examples = []
    for index, (title, (text, (words, voice, face))) in enumerate(SCRIPTS.items()):
        name = f"example {index + 1}.mp4"
        cues = {"text": words, "audio": voice, "vision": face}
        write_clip(
            folder / name, recipe, index, PlannedClip(name, text, words, "test", "", cues, "", ""), renderer
        )
        examples.append(Example(title, folder / name, text))
    return examples
