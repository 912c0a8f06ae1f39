# SPDX-License-Identifier: Apache-2.0
"""Front-ends: the sound and the face crops of a clip, as its encoders take them.

They run in the loader, so that one cache serves models with different encoders. Pretrained encoders bring a
front-end as an object of transformers, a feature extractor or an image processor. Without one, the encoders
learned from scratch read our log-mel spectrogram and the crops as they are.

Here a sound is never padded: a batch is padded with zeros, and masked, after all samples are converted.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import transformers
from scipy.sparse import csr_array
from transformers import (
    ASTFeatureExtractor,
    FeatureExtractionMixin,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.audio_utils import mel_filter_bank, window_function
from transformers.image_processing_utils import BaseImageProcessor

from feature_extractors.audio import HOP_MS, WINDOW_MS, log_mel, mel_power
from feature_extractors.clip import FULL_SCALE, SAMPLE_RATE, ClipFeatures, ExtractionSettings

AVERAGE_LOG_MEL = -11.0
"""Mean of our log-mel spectrogram in recorded speech, pauses included."""

FACE_SIZE = ExtractionSettings.face_size
"""Height and width of the crops that the convolutional face encoder reads, in pixels."""

WINDOW, HOP, KALDI_FFT = 400, 160, 512
"""Samples at 16 kHz of a step of all spectrograms (25 ms), between two steps (10 ms), and of Kaldi's FFT."""
KALDI_FLOOR = 2.0**-23
PREEMPHASIS = 0.97


@contextmanager
def empty_bands_expected() -> Iterator[None]:
    """Without the warning of transformers that bands are empty.

    The lowest of the Audio Spectrogram Transformer's 128 bands are narrower than the FFT; it was trained so.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filter has all zero values", UserWarning)
        yield


@dataclass(frozen=True)
class SoundFrontEnd:
    """How a feature extractor of transformers is used.

    Attributes:
        convert: From the extractor and a sound (samples,) float32 to the inputs of its encoder, (samples,) or
            (steps, width).
        longest: Longest sound that the extractor takes, in seconds.
        average: The average input in speech.
    """

    convert: Callable[[Any, np.ndarray], np.ndarray]
    longest: Callable[[Any], float] = lambda extractor: np.inf
    average: float = 0.0


def _normalised(extractor: Wav2Vec2FeatureExtractor, sound: np.ndarray) -> np.ndarray:
    return extractor(sound, sampling_rate=SAMPLE_RATE)["input_values"][0]


def _whisper(extractor: WhisperFeatureExtractor, sound: np.ndarray) -> np.ndarray:
    """The steps of the sound alone, of the 30 s that the extractor makes with torch, in all its threads."""
    window, hop = extractor.n_fft, extractor.hop_length
    followed = np.pad(sound, (0, window))  # by silence, as in 30 s
    padded = np.pad(followed, (window // 2, 0), mode="reflect")
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][: -(-len(sound) // hop)]
    taper = window_function(window, "hann").astype(np.float32)
    power = np.log10(np.maximum(mel_power(pieces * taper, _sparse(extractor.mel_filters)), 1e-10))
    return (np.maximum(power, power.max() - 8) + 4) / 4


def _w2v_bert(extractor: SeamlessM4TFeatureExtractor, sound: np.ndarray) -> np.ndarray:
    """Log filter bank, each band with mean 0 and deviation 1 over the sound; neighbours are joined."""
    stride = extractor.stride
    bands = _kaldi_filter_bank(sound * FULL_SCALE, "povey", extractor.num_mel_bins, 2 * stride)
    bands = (bands - bands.mean(axis=0)) / np.sqrt(bands.var(axis=0, ddof=1) + 1e-7)
    return bands[: len(bands) // stride * stride].reshape(-1, stride * bands.shape[1])


def _ast(extractor: ASTFeatureExtractor, sound: np.ndarray) -> np.ndarray:
    bands = _kaldi_filter_bank(sound, "hann", extractor.num_mel_bins)[: extractor.max_length]
    return extractor.normalize(bands) if extractor.do_normalize else bands


def _kaldi_filter_bank(sound: np.ndarray, taper: str, num_mels: int, fewest: int = 1) -> np.ndarray:
    """Log-mel filter bank in the manner of Kaldi, with the values of `transformers.audio_utils.spectrogram`.

    That function loops over the steps and takes ten times as long.

    Args:
        sound: Samples (samples,) float32.
        taper: Window function, "povey" or "hann".
        num_mels: Bands from 20 Hz to half the sample rate.
        fewest: Steps of a sound that is too short for them; it is followed by silence.

    Returns:
        Natural log of the mel power (steps, num_mels), float32; each step is a whole window of 25 ms.
    """
    window, bands = _kaldi_filters(taper, num_mels)
    missing = WINDOW + (fewest - 1) * HOP - len(sound)
    padded = np.pad(sound, (0, max(0, missing)))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]  # (steps, window)
    pieces = pieces - pieces.mean(axis=1, keepdims=True)
    before = np.concatenate([pieces[:, :1], pieces[:, :-1]], axis=1)
    power = mel_power((pieces - PREEMPHASIS * before) * window, bands, KALDI_FFT)
    return np.log(np.maximum(power, KALDI_FLOOR))


@lru_cache(maxsize=4)
@empty_bands_expected()
def _kaldi_filters(taper: str, num_mels: int) -> tuple[np.ndarray, csr_array]:
    bands = mel_filter_bank(
        num_frequency_bins=KALDI_FFT // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=20,
        max_frequency=SAMPLE_RATE // 2,
        sampling_rate=SAMPLE_RATE,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    return window_function(WINDOW, taper, periodic=False).astype(np.float32), _sparse(bands)


def _sparse(bands: np.ndarray) -> csr_array:
    return csr_array(bands.T.astype(np.float32))


SOUND_FRONT_ENDS: dict[type[FeatureExtractionMixin], SoundFrontEnd] = {
    Wav2Vec2FeatureExtractor: SoundFrontEnd(_normalised),  # of HuBERT, WavLM, data2vec and UniSpeech too
    WhisperFeatureExtractor: SoundFrontEnd(
        _whisper, lambda extractor: extractor.chunk_length, (AVERAGE_LOG_MEL / np.log(10) + 4) / 4
    ),
    SeamlessM4TFeatureExtractor: SoundFrontEnd(_w2v_bert),
    ASTFeatureExtractor: SoundFrontEnd(_ast, lambda extractor: extractor.max_length * HOP / SAMPLE_RATE),
}


def sound_inputs(
    features: ClipFeatures, seconds: float, extractor: FeatureExtractionMixin | None
) -> np.ndarray:
    """The first seconds of a clip's sound, as the audio encoder takes it.

    Args:
        features: The clip.
        seconds: How much of the sound is read.
        extractor: Feature extractor of the encoder; None for the log-mel spectrogram.

    Returns:
        float32: samples (samples,) for encoders of waveforms, else (steps, width); nothing of no sound.
    """
    if extractor is None:
        # the last window reaches beyond its step
        return log_mel(features.sound(seconds + WINDOW_MS / 1000))[: round(seconds * 1000 / HOP_MS)]
    sound = features.sound(seconds)
    values = SOUND_FRONT_ENDS[type(extractor)].convert(extractor, sound if len(sound) else np.zeros(1, "f4"))
    return np.ascontiguousarray(values[: None if len(sound) else 0], np.float32)


def sound_shape(seconds: float, extractor: FeatureExtractionMixin | None) -> tuple[int, ...]:
    """Shape of the input that `sound_inputs` makes of so much sound."""
    silence = np.zeros(round(seconds * SAMPLE_RATE), np.int16)
    features = replace(ClipFeatures.absent(ExtractionSettings()), waveform=silence)
    return sound_inputs(features, seconds, extractor).shape


def longest_sound(extractor: FeatureExtractionMixin | None) -> float:
    """Longest sound that the front-end takes, in seconds."""
    return np.inf if extractor is None else SOUND_FRONT_ENDS[type(extractor)].longest(extractor)


def average_sound(extractor: FeatureExtractionMixin | None) -> float:
    """The average audio input in speech, in place of a lost one."""
    return AVERAGE_LOG_MEL if extractor is None else SOUND_FRONT_ENDS[type(extractor)].average


def picture_inputs(features: ClipFeatures, image_processor: BaseImageProcessor | None) -> np.ndarray:
    """Face crops as the vision encoder takes them.

    Args:
        features: The clip.
        image_processor: Image processor of the encoder; None leaves the crops as they are.

    Returns:
        Without an image processor the crops (frames, height, width, 3), uint8; else float32 pictures
        (frames, 3, height, width). Zeros where no face was found.
    """
    if image_processor is None:
        return features.face_crops
    pictures = np.zeros((len(features.face_crops), *picture_shape(image_processor)), np.float32)
    if features.has_face:
        pictures[features.face_found] = _processed(features.face_crops[features.face_found], image_processor)
    return pictures


def picture_shape(image_processor: BaseImageProcessor) -> tuple[int, ...]:
    """Shape of one picture that an image processor makes: (3, height, width)."""
    size = face_size(image_processor)
    return _processed(np.zeros((1, size, size, 3), np.uint8), image_processor).shape[1:]


def _processed(crops: np.ndarray, image_processor: BaseImageProcessor) -> np.ndarray:
    inputs = image_processor(images=list(crops), return_tensors="np", input_data_format="channels_last")
    return inputs["pixel_values"]


def face_size(image_processor: BaseImageProcessor | None) -> int:
    """Height and width of crops that an image processor does not have to resize, in pixels."""
    if image_processor is None:
        return FACE_SIZE
    size = image_processor.size if image_processor.do_resize else image_processor.crop_size
    edges = () if size is None else (size.height, size.width, size.shortest_edge, size.longest_edge)
    return max(filter(None, edges), default=FACE_SIZE)


@empty_bands_expected()
def restore_extractor(extractor: FeatureExtractionMixin | dict[str, Any] | None) -> Any:
    """A feature extractor from its saved form, checked.

    Raises:
        ValueError: Its class is unknown, or it wants sound at another rate than 16 kHz.
    """
    known = {each.__name__: each for each in SOUND_FRONT_ENDS}
    if isinstance(extractor, dict):
        name = extractor.get("feature_extractor_type")
        extractor = known[name](**extractor) if name in known else name
    if extractor is not None and type(extractor) not in SOUND_FRONT_ENDS:
        name = extractor if isinstance(extractor, str) else type(extractor).__name__
        raise ValueError(f"the audio encoder's feature extractor is {name}: known are {', '.join(known)}")
    if extractor is not None and extractor.sampling_rate != SAMPLE_RATE:
        rate = extractor.sampling_rate
        raise ValueError(
            f"the feature extractor reads sound at {rate:,} samples a second; clips are read at "
            f"{SAMPLE_RATE:,}: choose an encoder for that rate"
            if isinstance(rate, int)
            else f"the feature extractor has sampling_rate {rate!r}: clips are read at {SAMPLE_RATE}"
        )
    return extractor


PILLOW_EQUIVALENTS = {"DINOv3ViTImageProcessor": "ViTImageProcessor"}
"""Image processors that exist for torchvision only, and those that do the same with Pillow."""


def pillow_equivalent(fields: dict[str, Any]) -> str | None:
    """The class in place of that of a saved image processor; None if the class has a version for Pillow."""
    return PILLOW_EQUIVALENTS.get(str(fields.get("image_processor_type")).removesuffix("Fast"))


def restore_image_processor(processor: BaseImageProcessor | dict[str, Any] | None) -> Any:
    """An image processor from its saved form, on Pillow: inputs are the same with and without torchvision.

    Raises:
        ValueError: Its class is unknown, or it does not make pictures of one size.
    """
    if processor is None:
        return None
    fields = dict(processor) if isinstance(processor, dict) else processor.to_dict()
    equivalent, name = pillow_equivalent(fields), str(fields.pop("image_processor_type", None))
    pillow = getattr(transformers, f"{equivalent or name.removesuffix('Fast')}Pil", None)
    if not (isinstance(pillow, type) and issubclass(pillow, BaseImageProcessor)):
        raise ValueError(
            f"the vision encoder's image processor is {name}, which transformers {transformers.__version__} "
            "does not have for Pillow: choose another encoder"
        )
    restored = pillow(**fields)
    if len(shape := picture_shape(restored)) != 3:
        raise ValueError(
            f"the vision encoder's image processor {name} makes inputs of shape {tuple(shape)}, not pictures "
            "of one size: choose another encoder"
        )
    return restored
