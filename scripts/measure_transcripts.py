# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Measure a speech recogniser: errors of words, seconds a clip, and how far an even grid is from its words.

    python scripts/measure_transcripts.py DATA/grid DATA/crema_d --synthetic 32 --transcribe whisper-tiny.en

Each folder has a `metadata.csv` with the sentences that are spoken. Case and punctuation do not count, and
"F2" is "f two", as the sentences of GRID are written. Nothing is read from the cache.

The times of words in these recordings are not known. So the even grid, on which all tokens of a text take
equally long, is compared with the recogniser's own times. With `--synthetic` sentences are put together from
single words that espeak-ng speaks, at known times, and both are compared with these.
"""

import argparse
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import jiwer
import numpy as np
from rich.console import Console

from feature_extractors import SAMPLE_RATE, ClipExtent, ClipFeatures, ExtractionSettings, decode
from feature_extractors.transcript import Transcript, Word
from msa_online.corpora.reading import read_corpus
from msa_online.encoders.pretrained import load_tokenizer
from msa_online.processing_msa import MSAProcessor
from msa_online.synthetic.voice import CARRIERS, VOICE_RATE, VOICES, Speech, speak
from msa_online.transcription import DEFAULT_MODEL, Transcriber
from msa_online.user_errors import run_command

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAUSE = 0.25
"""Seconds of silence before the first and after the last word of a synthetic sentence."""


def measure(options: argparse.Namespace, console: Console) -> None:
    """Print a table in Markdown, one row for each folder and one for synthetic sentences."""
    began = time.process_time()
    transcriber = Transcriber(options.transcribe, options.language)
    console.out(f"{transcriber.name}: loaded in {time.process_time() - began:.1f} CPU seconds")
    processor = MSAProcessor(load_tokenizer(options.text_encoder), {})
    console.out("| clips | n | without words | WER | CPU s a clip | even grid from words, s | tokens off |")
    console.out("|---|---:|---:|---:|---:|---:|---:|")
    for folder in options.folders:
        samples = read_corpus(folder, label_column=None).samples
        sounds = [decode(sample.clip, num_frames=1).waveform for sample in samples]
        heard, seconds = transcribe(transcriber, sounds)
        row(console, Path(folder).name, [s.text for s in samples], heard, seconds, processor, sounds)
        if options.show:
            for sample, transcript in zip(samples, heard, strict=True):
                console.out(f"    {sample.text!r}: {transcript.text!r}")
    if options.synthetic:
        sentences = [sentence(number) for number in range(options.synthetic)]
        sounds = [sound for _, sound in sentences]
        heard, seconds = transcribe(transcriber, sounds)
        texts = [transcript.text for transcript, _ in sentences]
        row(console, "synthetic", texts, heard, seconds, processor, sounds)
        found, even, count = time_errors([truth for truth, _ in sentences], heard, sounds)
        console.out(
            f"middle of a word, {count} words recognised as spoken: the recogniser is {found:.2f} s from the "
            f"truth on average, an even grid over the clip {even:.2f} s"
        )


def transcribe(transcriber: Transcriber, sounds: list[np.ndarray]) -> tuple[list[Transcript], float]:
    """Transcripts of sounds (samples,) float32 at 16 kHz, and CPU seconds a sound."""
    began = time.process_time()
    heard = [transcriber(features_of(sound)) for sound in sounds]
    return heard, (time.process_time() - began) / len(sounds)


def features_of(sound: np.ndarray) -> ClipFeatures:
    """A clip without pictures."""
    return replace(
        ClipFeatures.absent(ExtractionSettings()),
        waveform=np.round(np.clip(sound, -1, 1) * 32_767).astype(np.int16),
        duration=len(sound) / SAMPLE_RATE,
    )


def row(
    console: Console,
    name: str,
    texts: list[str],
    heard: list[Transcript],
    seconds: float,
    processor: MSAProcessor,
    sounds: list[np.ndarray],
) -> None:
    """Print the row of some clips."""
    measured = jiwer.process_words([plain(text) for text in texts], [plain(each.text) for each in heard])
    silent = sum(not each.text for each in heard)
    away, off = np.concatenate(
        [from_even_grid(processor, *pair) for pair in zip(heard, sounds, strict=True)], axis=1
    )
    columns = (f"{measured.wer:.1%}", f"{seconds:.2f}", f"{away.mean():.2f}", f"{off.mean():.0%}")
    console.out(f"| {name} | {len(texts)} | {silent} | {' | '.join(columns)} |")


def plain(text: str) -> str:
    """A text without case and punctuation; "F2" becomes "f two"."""
    text = re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])|(?<=\d)(?=\d)", " ", text.lower())
    text = re.sub(r"\d", lambda digit: DIGITS[int(digit[0])], text)
    return " ".join(re.sub(r"[^\w\s']", " ", text).split())


def from_even_grid(processor: MSAProcessor, heard: Transcript, sound: np.ndarray) -> np.ndarray:
    """How far the even share of each token is from its word, (2, tokens with a word).

    First the seconds between their middles, then 1 where they have no moment in common, else 0.
    """
    seconds = len(sound) / SAMPLE_RATE
    spans = processor.word_spans(heard.text, heard, ClipExtent(seconds, seconds, 0))[:, 0].numpy() * seconds
    known = ~np.isnan(spans[:, 0])
    bounds = np.linspace(0, seconds, len(spans) + 1)
    even = np.stack([bounds[:-1], bounds[1:]], axis=1)[known]
    words = spans[known]
    apart = (words[:, 1] < even[:, 0]) | (words[:, 0] > even[:, 1])
    return np.stack([np.abs(words.mean(axis=1) - even.mean(axis=1)), apart])


def sentence(number: int) -> tuple[Transcript, np.ndarray]:
    """A sentence of espeak-ng put together from single words, and the sound (samples,) at 16 kHz."""
    speech = Speech(VOICES[number % len(VOICES)], 48, 50, 150)
    text = CARRIERS[number % len(CARRIERS)]
    pieces, words, place = [np.zeros(round(PAUSE * SAMPLE_RATE), np.float32)], [], PAUSE
    for word in text.split():
        sound = audible(resampled(speak(word, speech)))
        pieces.append(sound)
        words.append(Word(word, place, place + len(sound) / SAMPLE_RATE))
        place = words[-1].end
    sound = np.concatenate([*pieces, pieces[0]])
    return Transcript(text, tuple(words), "en", "espeak-ng"), sound


def resampled(sound: np.ndarray) -> np.ndarray:
    """The sound of espeak-ng at 16 kHz."""
    times = np.arange(round(len(sound) / VOICE_RATE * SAMPLE_RATE)) / SAMPLE_RATE
    return np.interp(times, np.arange(len(sound)) / VOICE_RATE, sound).astype(np.float32)


def audible(sound: np.ndarray) -> np.ndarray:
    """The part between the first and the last sample that is louder than 1 % of the peak."""
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    return sound[loud[0] : loud[-1] + 1]


def time_errors(
    truths: list[Transcript], heard: list[Transcript], sounds: list[np.ndarray]
) -> tuple[float, float, int]:
    """Mean error of the middle of a word in seconds: of the recogniser, of an even grid of words; how many.

    Only words that were recognised as they were spoken count.
    """
    found, even = [], []
    for truth, other, sound in zip(truths, heard, sounds, strict=True):
        spoken, written = ([plain(word.text) for word in each.words] for each in (truth, other))
        if not written:
            continue
        aligned = jiwer.process_words(" ".join(spoken), " ".join(written)).alignments[0]
        if len(" ".join(written).split()) != len(written):
            continue  # a word of the recogniser is two words in the sentence
        for chunk in aligned:
            if chunk.type != "equal":
                continue
            indices = range(chunk.ref_start_idx, chunk.ref_end_idx)
            for first, second in zip(indices, range(chunk.hyp_start_idx, chunk.hyp_end_idx), strict=True):
                middle = (truth.words[first].start + truth.words[first].end) / 2
                word = other.words[second]
                found.append(abs((word.start + word.end) / 2 - middle))
                even.append(abs((second + 0.5) / len(written) * len(sound) / SAMPLE_RATE - middle))
    return float(np.mean(found)), float(np.mean(even)), len(found)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="clips with their sentences")
    parser.add_argument("--transcribe", default=DEFAULT_MODEL, metavar="MODEL", help="the recogniser")
    parser.add_argument("--language", metavar="CODE", help="the spoken language")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="synthetic sentences")
    parser.add_argument(
        "--text-encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="whose tokens are aligned"
    )
    parser.add_argument("--show", action="store_true", help="print sentences and transcripts")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    sys.exit(run_command(lambda: measure(options, Console(highlight=False, soft_wrap=True))))
