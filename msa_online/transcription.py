# SPDX-License-Identifier: Apache-2.0
"""Transcripts by speech recognition, for clips that have none: words with their times.

Silero's voice activity detection, which faster-whisper brings, finds the parts with speech. Only those reach
the recogniser, because Whisper invents words for silence, noise and music. A clip without speech has no text.
"""

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from feature_extractors import Clip, ClipFeatures, FeatureCache, get_asset
from feature_extractors.catalogue import asset_of_model
from feature_extractors.clip import SAMPLE_RATE, printable
from feature_extractors.decoding import decode_sound
from feature_extractors.sources import why_hub_is_silent
from feature_extractors.transcript import Transcript, Word
from msa_online.encoders.pretrained import NO_CODE, UNREADABLE, first_line_of
from msa_online.extras import why_not_installed
from msa_online.processing_msa import clean_text

DEFAULT_MODEL = "whisper-tiny.en"
"""The recogniser that `msa-online get-models` brings; English only."""

FORMAT_VERSION = 1
"""Part of every key in the cache; increase it when equal models give other transcripts."""

PIECE = 28.0
"""Longest sound in seconds that a recogniser gets at once; Whisper reads 30."""

PADDING = round(0.4 * SAMPLE_RATE)
"""Samples before and after the speech that a recogniser gets too."""

PART, MARGIN = 300.0, 3.0
"""Seconds of a long recording that are decoded at once, and what is added at both ends, so that no word is
cut."""

REPETITIVE = 2.4
"""Texts that compress by more than this repeat a phrase; Whisper's own limit."""

MODEL_FILES = ("*.json", "vocabulary.txt", "vocab.txt", "merges.txt", "*.model", "model.bin", "*.safetensors")
"""Files of a recogniser on the Hub: weights as safetensors or for CTranslate2, never pickles."""


class TranscriptionError(RuntimeError):
    """Clips cannot be transcribed: the recogniser is unavailable, or does not know the language."""


@dataclass(frozen=True)
class _Heard:
    """What a recogniser makes of one piece of sound: text as written, its words, the language."""

    text: str
    words: tuple[Word, ...]
    language: str | None


Recogniser = Callable[[np.ndarray, str | None], _Heard]
"""From sound (samples,) float32 of at most `PIECE` seconds, and a language or None."""


class Transcriber:
    """Transcribes clips with one recogniser, which is loaded once.

    Args:
        model: `whisper-tiny.en`, which `msa-online get-models` brings; a size of faster-whisper such as
            "small" or "large-v3"; or a folder or Hub repository with a Whisper model for CTranslate2 or a
            model of transformers for speech recognition (Whisper, or CTC such as wav2vec 2.0).
        language: Code of the spoken language, such as "en". None lets a multilingual Whisper detect it in
            each clip.
        cache: Where transcripts are kept, by sound, recogniser and language; None transcribes every time.

    Attributes:
        name: Name of the recogniser; of a folder its last part.
        language: As given.
        gives_times: Whether words have times.
        made: Number of clips transcribed now; the others were in the cache.

    Raises:
        TranscriptionError: faster-whisper is not installed; the model is neither on this machine nor
            available from the Hub, damaged, or not one for speech recognition; or it does not know the
            language.
        AssetError: The default recogniser is unavailable.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, language: str | None = None, cache: FeatureCache | None = None
    ) -> None:
        if reason := why_not_installed("faster_whisper"):
            raise TranscriptionError(f"clips cannot be transcribed: {reason}")
        folder = _folder_of(model)
        self.name = folder.name if Path(model).expanduser().is_dir() else model
        self.language, self.cache, self.made = language, cache, 0
        is_for_ctranslate = (folder / "model.bin").is_file()
        load = _load_faster_whisper if is_for_ctranslate else _load_transformers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._recogniser, languages, self.gives_times = load(folder, model)
        _check_language(model, language, languages)
        digests = FeatureCache() if cache is None else cache
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        self._identity = [FORMAT_VERSION, *(f"{each.name} {digests.file_digest(each)}" for each in files)]

    @property
    def identity(self) -> str:
        """Hash of the recogniser and the language: equal ones make equal transcripts of equal sounds."""
        return hashlib.sha256(json.dumps([*self._identity, self.language]).encode()).hexdigest()

    def __call__(self, features: ClipFeatures) -> Transcript:
        """The transcript of an extracted clip, from the cache if it has it.

        Raises:
            CacheError: The cache cannot be written.
            TranscriptionError: The recogniser failed.
        """
        if not features.has_audio:
            return self._nothing
        return self._cached(features.sound())

    def recording(self, clip: Clip) -> Transcript:
        """The transcript of a recording of any length; memory does not grow with it.

        Raises:
            CacheError: The cache cannot be written.
            ClipError: The clip cannot be used.
            TranscriptionError: The recogniser failed, or gives no times of words.
        """
        if not self.gives_times:
            raise TranscriptionError(
                f"{self.name} gives no times of words, which the windows of a long recording need: use a "
                "Whisper model for faster-whisper"
            )
        parts = []
        for start, end, first, sound in decode_sound(clip, PART, MARGIN):
            part = self._cached(sound).between(start - first, end - first)
            later = tuple(replace(w, start=w.start + start, end=w.end + start) for w in part.words)
            parts.append(replace(part, words=later))
        language = next((part.language for part in parts if part.text), None)
        text = " ".join(part.text for part in parts if part.text)
        return Transcript(text, tuple(word for part in parts for word in part.words), language, self.name)

    @property
    def _nothing(self) -> Transcript:
        return Transcript("", (), self.language, self.name)

    def _cached(self, sound: np.ndarray) -> Transcript:
        if self.cache is None:
            return self._transcribe(sound)
        content = hashlib.sha256(self.identity.encode() + sound.tobytes()).hexdigest()
        path = self.cache.folder / "transcripts" / content[:2] / f"{content}.json"
        if (stored := _stored(path)) is not None:
            return replace(stored, model=self.name)
        made = self._transcribe(sound)
        line = json.dumps(asdict(made))
        self.cache.write(
            path, json.dumps({"transcript": line, "checksum": zlib.crc32(line.encode())}).encode()
        )
        return made

    def _transcribe(self, sound: np.ndarray) -> Transcript:
        """Recognise each piece with speech; a piece has the language of the first."""
        self.made += 1
        texts, words, language = [], [], self.language
        for begin, end in pieces_with_speech(sound):
            first = max(begin - PADDING, 0)
            try:
                heard = self._recogniser(sound[first : end + PADDING], language)
            except (RuntimeError, ValueError) as error:  # out of memory, a missing library of the GPU
                raise TranscriptionError(f"{self.name} failed: {first_line_of(error)}") from error
            language = language or heard.language
            text = clean_text(heard.text)
            if text and not is_repetitive(text):
                texts.append(text)
                spoken = (begin / SAMPLE_RATE, end / SAMPLE_RATE)
                words += _checked_words(text, heard.words, first / SAMPLE_RATE, spoken)
        return Transcript(" ".join(texts), tuple(words), language, self.name)


def transcriber_of(
    transcribe: Transcriber | str | None, language: str | None, cache: FeatureCache | None
) -> Transcriber | None:
    """The recogniser that is asked for: as given, or made from its name and a language; None for none.

    Raises:
        AssetError: As for `Transcriber`.
        TranscriptionError: As for `Transcriber`; or there is a language without the name of a recogniser.
    """
    if isinstance(transcribe, str):
        return Transcriber(transcribe, language, cache)
    if language is not None:
        raise TranscriptionError(
            f"language {language} applies to recognised speech only: name a recogniser with transcribe"
        )
    return transcribe


def pieces_with_speech(sound: np.ndarray) -> Iterator[tuple[int, int]]:
    """Parts of a sound (samples,) float32 at 16 kHz that contain speech, of about `PIECE` seconds at most.

    Pauses inside a piece remain. Yields the first sample of each piece, and the one after its last.
    """
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    begin = end = None
    for spoken in get_speech_timestamps(sound, VadOptions(max_speech_duration_s=PIECE, speech_pad_ms=0)):
        if begin is not None and spoken["end"] - begin > PIECE * SAMPLE_RATE:
            yield begin, end
            begin = None
        begin = spoken["start"] if begin is None else begin
        end = spoken["end"]
    if begin is not None:
        yield begin, end


def is_repetitive(text: str) -> bool:
    """Whether a text repeats a phrase over and over, as recognisers do when they are lost."""
    content = text.encode()
    return len(content) / len(zlib.compress(content)) > REPETITIVE


def _checked_words(
    text: str, words: tuple[Word, ...], first: float, spoken: tuple[float, float]
) -> Iterator[Word]:
    """Words that are in the text, in its order, with times from the start of the clip.

    Whisper begins the first word with the piece and may end the last one beyond it, so times are limited to
    the part with speech.

    Args:
        text: The text of a piece.
        words: Its words, with times from the start of the piece.
        first: Start of the piece in seconds.
        spoken: Start and end of the speech in it, in seconds.
    """
    place, (earliest, last) = 0, spoken
    for word in words:
        written = clean_text(word.text)
        if not written or (found := text.find(written, place)) < 0:
            continue
        place = found + len(written)
        start = min(max(first + float(word.start), earliest), last)
        end = min(max(first + float(word.end), start), last)
        earliest = start
        yield Word(written, round(start, 3), round(end, 3), word.probability)


def _stored(path: Path) -> Transcript | None:
    """A transcript in the cache; None if there is none, or it is damaged."""
    try:
        entry = json.loads(path.read_text("utf-8"))
        if entry["checksum"] != zlib.crc32(entry["transcript"].encode()):
            return None
        return Transcript.from_dict(json.loads(entry["transcript"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_language(model: str, language: str | None, languages: tuple[str, ...] | None) -> None:
    """Refuse a language that a recogniser does not know; `languages` None: it has no choice of language."""
    if language is None or (languages is not None and language in languages):
        return
    if languages is None:
        raise TranscriptionError(
            f"language {language}: {model} has no choice of language; leave language out"
        )
    if languages == ("en",):
        raise TranscriptionError(
            f"language {language}: {model} knows English (en) only; give a multilingual one, such as small"
        )
    raise TranscriptionError(
        f"language {language} is unknown to {model}; it knows the codes {', '.join(sorted(languages))}"
    )


def _folder_of(model: str) -> Path:
    """Folder of a recogniser by name, downloaded if necessary."""
    from faster_whisper.utils import available_models, download_model

    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise TranscriptionError(
            f"{printable(model)} is a file, not a speech recogniser; on a command line, name clips before "
            "--transcribe"
        )
    if DEFAULT_MODEL in (model, f"whisper-{model}", asset_of_model(model)):
        return get_asset(DEFAULT_MODEL)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    silent = why_hub_is_silent()
    sizes = available_models()
    try:
        if model in sizes:
            return Path(download_model(model, local_files_only=bool(silent)))
        return Path(snapshot_download(model, allow_patterns=list(MODEL_FILES), local_files_only=bool(silent)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = silent or first_line_of(error)
        raise TranscriptionError(
            f"speech recogniser {printable(model)!r} is neither a folder nor in the cache of models, and the "
            f"Hub did not return it ({reason}); give {DEFAULT_MODEL} (`msa-online get-models "
            f"{DEFAULT_MODEL}`), a size ({', '.join(sizes[:6])}, ...), a folder, or a repository"
        ) from error


def _load_faster_whisper(folder: Path, name: str) -> tuple[Recogniser, tuple[str, ...], bool]:
    """A Whisper model in the format of CTranslate2, its languages, and that it gives times."""
    from faster_whisper import WhisperModel

    if not (folder / "tokenizer.json").is_file():  # else faster-whisper asks the Hub for one
        raise TranscriptionError(f"speech recogniser {name!r}: {folder} has no tokenizer.json")
    try:
        model = WhisperModel(str(folder), local_files_only=True, compute_type="float32")
    except (RuntimeError, ValueError, OSError, TypeError, KeyError) as error:
        raise TranscriptionError(
            f"speech recogniser {name!r}: the files in {folder} cannot be read ({first_line_of(error)})"
        ) from error

    def recognise(sound: np.ndarray, language: str | None) -> _Heard:
        # one temperature: Whisper's retries draw random numbers
        segments, info = model.transcribe(
            sound, language, temperature=0.0, word_timestamps=True, condition_on_previous_text=False
        )
        kept = [segment for segment in segments if not is_repetitive(segment.text)]
        words = tuple(
            Word(word.word, float(word.start), float(word.end), round(float(word.probability), 3))
            for segment in kept
            for word in segment.words
        )
        return _Heard("".join(word.text for word in words), words, info.language)

    return recognise, tuple(model.supported_languages), True


def _load_transformers(folder: Path, name: str) -> tuple[Recogniser, tuple[str, ...] | None, bool]:
    """A model of transformers for speech recognition, its languages, and whether it gives times."""
    import torch
    from transformers import (
        MODEL_FOR_CTC_MAPPING,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        AutoConfig,
        AutoFeatureExtractor,
        AutomaticSpeechRecognitionPipeline,
        AutoModelForCTC,
        AutoModelForSpeechSeq2Seq,
        AutoTokenizer,
    )

    def refuse(problem: str) -> TranscriptionError:
        return TranscriptionError(f"speech recogniser {printable(name)!r}: {problem}")

    if not (folder / "config.json").is_file():
        raise refuse(
            f"{printable(folder)} has neither model.bin (CTranslate2) nor config.json (transformers); on a "
            "command line, name clips before --transcribe"
        )
    local = {"local_files_only": True, **NO_CODE}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        if type(config) in MODEL_FOR_CTC_MAPPING:
            kind = AutoModelForCTC
        elif type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
            kind = AutoModelForSpeechSeq2Seq
        else:
            raise refuse(f"a {config.model_type} is no model for speech recognition")
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **local
        )
        if missing := report["missing_keys"]:
            raise refuse(f"{len(missing)} of its weights are missing, for example {min(missing)}")
        extractor = AutoFeatureExtractor.from_pretrained(folder, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except UNREADABLE as error:
        if isinstance(error, TranscriptionError):
            raise
        raise refuse(f"the files in {folder} cannot be read ({first_line_of(error)})") from error
    if extractor.sampling_rate != SAMPLE_RATE:
        raise refuse(f"it wants sound at {extractor.sampling_rate} Hz, not {SAMPLE_RATE}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = AutomaticSpeechRecognitionPipeline(
        model=model.eval(), tokenizer=tokenizer, feature_extractor=extractor, device=device
    )
    generation = getattr(model, "generation_config", None)
    is_whisper = pipeline.type == "seq2seq_whisper"
    gives_times = pipeline.type == "ctc" or (is_whisper and hasattr(generation, "alignment_heads"))
    tokens = getattr(generation, "lang_to_id", None) if is_whisper else None
    languages = tuple(token.strip("<|>") for token in tokens) if tokens else ("en",) if is_whisper else None

    only = languages[0] if languages and len(languages) == 1 else None

    def recognise(sound: np.ndarray, language: str | None) -> _Heard:
        spoken = {"language": language, "task": "transcribe"} if tokens and language else {}
        found = pipeline(
            sound,
            return_timestamps="word" if gives_times else None,
            **({"generate_kwargs": spoken} if spoken else {}),
        )
        seconds = len(sound) / SAMPLE_RATE
        timed = [(each["text"], *each["timestamp"]) for each in found.get("chunks", ())]
        words = tuple(
            Word(text, start, seconds if end is None else end)
            for text, start, end in timed
            if start is not None
        )
        return _Heard(found["text"], words, language or only)

    return recognise, languages, gives_times
