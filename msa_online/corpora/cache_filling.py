# SPDX-License-Identifier: Apache-2.0
"""Fill the feature cache before training, and report what the clips lack."""

import errno
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
    track,
)
from rich.text import Text

from feature_extractors.assets import get_asset
from feature_extractors.cache import CacheError, FeatureCache
from feature_extractors.clip import (
    FINDINGS,
    NUM_BLENDSHAPES,
    SAMPLE_RATE,
    Clip,
    ClipError,
    ClipExtent,
    ClipFeatures,
    ExtractionSettings,
    kind_of,
)
from feature_extractors.transcript import Transcript
from feature_extractors.worker import Extracted, extract_in_processes
from msa_online.corpora.corpus import BrokenRow, Corpus, CorpusError, Sample
from msa_online.corpora.prepared_corpus import EMPTY_TEXT, LACKS, LATE_SOUND, NOTHING, PreparedCorpus
from msa_online.modalities import MODALITIES
from msa_online.processing_msa import MAX_AUDIO_SECONDS, clean_text
from msa_online.transcription import Transcriber

TYPICAL_SECONDS = 10.0  # of a clip without a window, to estimate disk space before it is decoded


def prepare(
    corpus: Corpus,
    cache: FeatureCache,
    settings: ExtractionSettings,
    workers: int | None = None,
    skip_broken: bool = False,
    max_audio_seconds: float = MAX_AUDIO_SECONDS,
    transcriber: Transcriber | None = None,
) -> PreparedCorpus:
    """Extract the features of all clips that are not in the cache.

    It can be interrupted at any time; the next run continues from there. Worker processes import the calling
    script, which therefore needs the usual `if __name__ == "__main__":`.

    Args:
        corpus: What `read_corpus` returned.
        cache: Cache to fill.
        settings: What to extract.
        workers: Number of processes; by default the number of usable cores.
        skip_broken: Leave out clips that cannot be decoded, instead of raising.
        max_audio_seconds: How much of the sound the model reads. Audio that is silent until then is missing.
        transcriber: Makes the texts of clips that have none; None leaves them without.

    Raises:
        CorpusError: Clips cannot be used (all are listed with their lines), or no clip can. This includes
            clips that time out or crash the extracting process. The other clips are extracted all the same.
        CacheError: The disk is too small for the features, or not writable.
        AssetError: The face model is needed and unavailable.
        WorkerError: The worker processes cannot be started.
        ClipError: A file was deleted after the corpus was read.
        TranscriptionError: The recogniser failed.
    """
    began = time.perf_counter()
    keys, contents, findings, extents = _look_up(corpus.samples, cache, settings)
    missing = {keys[sample.id]: sample.clip for sample in corpus.samples if keys[sample.id] not in findings}
    failures: dict[str, ClipError] = {}
    if missing:
        _require_space(missing.values(), cache, settings)
        get_asset("face_landmarker")  # download it once, before many processes need it
        extracted, failures = _extract_all(missing, cache, settings, workers or usable_cores())
        for key, (found, extent) in extracted.items():
            findings[key], extents[key] = found, extent
    usable = [sample for sample in corpus.samples if keys[sample.id] in findings]
    broken = [
        _broken(sample, failures[keys[sample.id]]) for sample in corpus.samples if keys[sample.id] in failures
    ]
    if broken and not (skip_broken and usable):
        raise CorpusError.of_rows(corpus.source, broken)
    transcripts = _transcribe(usable, keys, cache, transcriber) if transcriber else {}
    usable = [
        replace(sample, text=transcripts[sample.id].text) if sample.id in transcripts else sample
        for sample in usable
    ]
    return PreparedCorpus(
        corpus=replace(corpus, samples=tuple(usable), broken=(*corpus.broken, *broken)),
        cache=cache,
        keys={sample.id: keys[sample.id] for sample in usable},
        found=_by_finding(usable, keys, findings, extents, max_audio_seconds),
        extents={sample.id: extents[keys[sample.id]] for sample in usable},
        extracted=sum(keys[sample.id] in missing for sample in usable),
        seconds=time.perf_counter() - began,
        contents={sample.id: contents[sample.id] for sample in usable},
        transcripts=transcripts,
    )


def _transcribe(
    samples: Sequence[Sample], keys: Mapping[str, str], cache: FeatureCache, transcriber: Transcriber
) -> dict[str, Transcript]:
    """Transcripts of the samples without a text, by sample id."""
    without = [sample for sample in samples if not clean_text(sample.text)]
    transcripts = {}
    if without:
        with progress_bar() as progress:
            for sample in progress.track(without, description="recognising speech"):
                features = load_features(cache, keys[sample.id], sample)
                transcripts[sample.id] = transcriber(features)
    return transcripts


def load_features(cache: FeatureCache, key: str, sample: Sample) -> ClipFeatures:
    """The features of a sample's clip, from the cache.

    Raises:
        CacheError: They were deleted after `prepare`.
    """
    features = cache.load(key)
    if features is None:
        raise CacheError(
            f"the features of {sample.clip.path} were deleted from the cache {cache.folder}: start again to "
            "extract them"
        )
    return features


def _look_up(
    samples: Sequence[Sample], cache: FeatureCache, settings: ExtractionSettings
) -> tuple[dict[str, str], dict[str, str], dict[str, tuple[str, ...]], dict[str, ClipExtent]]:
    """Cache keys and hashes of files by sample id; findings and extents of cached clips by key."""
    keys: dict[str, str] = {}
    contents: dict[str, str] = {}
    findings: dict[str, tuple[str, ...]] = {}
    extents: dict[str, ClipExtent] = {}
    for sample in track(samples, "reading the cache", transient=True, console=Console(stderr=True)):
        key = keys[sample.id] = cache.key(sample.clip, settings)
        contents[sample.id] = cache.file_digest(sample.clip.path)
        if key not in findings and (features := cache.load(key)) is not None:
            findings[key] = features.findings
            extents[key] = ClipExtent.of(features)
    return keys, contents, findings, extents


def _extract_all(
    clips: Mapping[str, Clip], cache: FeatureCache, settings: ExtractionSettings, workers: int
) -> tuple[dict[str, Extracted], dict[str, ClipError]]:
    """Extract clips, by cache key, in several processes; returns results and failures by key."""
    extracted: dict[str, Extracted] = {}
    failures: dict[str, ClipError] = {}
    with (
        closing(extract_in_processes(clips, cache, settings, workers)) as results,
        progress_bar() as progress,
    ):
        for key, result in progress.track(results, len(clips), description="extracting features"):
            if isinstance(result, ClipError):
                failures[key] = result
            else:
                extracted[key] = result
    return extracted, failures


def _require_space(clips: Iterable[Clip], cache: FeatureCache, settings: ExtractionSettings) -> None:
    """Check that the features are likely to fit on the disk.

    Raises:
        CacheError: They are not.
    """
    needed = sum(_estimated_bytes(clip, settings) for clip in clips)
    folder = next(folder for folder in (cache.folder, *cache.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CacheError(
            errno.ENOSPC,
            f"the features need about {needed:,} bytes but {cache.folder} has {free:,} bytes free; free disk "
            "space, or set MSA_CACHE to a folder on a larger disk",
        )


def _estimated_bytes(clip: Clip, settings: ExtractionSettings) -> int:
    seconds = TYPICAL_SECONDS if clip.end is None else clip.end - (clip.start or 0.0)
    frame = settings.face_size**2 * 3 + NUM_BLENDSHAPES * 4
    return round(settings.num_frames * frame + seconds * SAMPLE_RATE * 2)


def usable_cores() -> int:
    """Cores that this process may use; in a container, fewer than the machine has."""
    import joblib

    return joblib.cpu_count()


def _broken(sample: Sample, error: ClipError) -> BrokenRow:
    """The row of a clip that could not be decoded; the error may stem from another file of equal content."""
    return BrokenRow(
        sample.source, sample.line, str(ClipError(sample.clip.path, error.problem, error.detail))
    )


def _by_finding(
    samples: Sequence[Sample],
    keys: Mapping[str, str],
    findings: Mapping[str, tuple[str, ...]],
    extents: Mapping[str, ClipExtent],
    max_audio_seconds: float,
) -> dict[str, tuple[Sample, ...]]:
    kinds = {key: {kind_of(name) for name in names} for key, names in findings.items()}
    others = sorted({name for key in keys.values() for name in kinds.get(key, ())} - set(FINDINGS))
    found = {
        name: tuple(sample for sample in samples if name in kinds[keys[sample.id]])
        for name in (*FINDINGS, *others)
    }
    late = [sample for sample in samples if extents[keys[sample.id]].audible_from >= max_audio_seconds]
    found[LATE_SOUND] = tuple(late)
    found[EMPTY_TEXT] = tuple(sample for sample in samples if not clean_text(sample.text))
    lacking = [{sample.id for finding in LACKS[name] for sample in found[finding]} for name in MODALITIES]
    found[NOTHING] = tuple(sample for sample in samples if all(sample.id in ids for ids in lacking))
    return {name: having for name, having in found.items() if having}


class _Speed(ProgressColumn):
    """Clips per second; rich has no such column."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} clips/s" if task.speed else "", style="progress.data.speed")


def progress_bar() -> Progress:
    """A bar on stderr with the number of clips, their rate and the remaining time."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
