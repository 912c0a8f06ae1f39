# SPDX-License-Identifier: Apache-2.0
"""Predict for many files: other processes decode while the model predicts."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from feature_extractors import CacheError, Clip, ClipError, ClipFeatures, FeatureCache
from feature_extractors.worker import extract_in_processes
from msa_online.pipeline import BATCH_SIZE, MSAPipeline, Prediction
from msa_online.pipeline_inputs import Sample

PENDING_BATCHES = 2
"""Batches that may wait for the model, so that memory stays bounded if decoding is faster."""


def predict_in_processes(
    pipeline: MSAPipeline,
    samples: Sequence[Sample],
    cache: FeatureCache,
    workers: int,
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[int, Prediction | ClipError]]:
    """Predict for files; a clip that cannot be used stops no other, even if it hangs or crashes a decoder.

    Close the iterator to stop early; clips in progress are finished.

    Args:
        pipeline: The model.
        samples: Clips that are files, with their transcripts.
        cache: Cache for the extracted features.
        workers: Number of processes that extract.
        batch_size: Clips in one forward pass.

    Yields:
        The index of each sample and its prediction, or the error of its clip; in no fixed order.

    Raises:
        CacheError: The cache cannot be written.
        WorkerError: Processes cannot be started.
        UndefinedScoreError: The model's predictions are not finite.
    """
    waiting: list[tuple[int, Sample, ClipFeatures]] = []
    pending: deque[tuple[list[int], Future[list[Prediction]]]] = deque()
    with ThreadPoolExecutor(1) as model, closing(_extracted(pipeline, samples, cache, workers)) as results:

        def submit() -> None:
            pairs = [(sample, features) for _, sample, features in waiting]
            pending.append(([index for index, *_ in waiting], model.submit(pipeline.predict, pairs)))
            waiting.clear()

        for index, result in results:
            if isinstance(result, ClipError):
                yield index, result
                continue
            waiting.append((index, samples[index], result))
            if len(waiting) == batch_size:
                submit()
            while pending and (len(pending) > PENDING_BATCHES or pending[0][1].done()):
                yield from _done(pending)
        if waiting:
            submit()
        while pending:
            yield from _done(pending)


def _done(
    pending: deque[tuple[list[int], Future[list[Prediction]]]],
) -> Iterator[tuple[int, Prediction]]:
    """The oldest batch, once it is predicted."""
    indices, future = pending.popleft()
    yield from zip(indices, future.result(), strict=True)


def _extracted(
    pipeline: MSAPipeline, samples: Sequence[Sample], cache: FeatureCache, workers: int
) -> Iterator[tuple[int, ClipFeatures | ClipError]]:
    """Features of each sample by its index: first those in the cache, then those of the processes."""
    settings = pipeline.processor.settings
    track = (pipeline.model.config.trained_on or {}).get("audio_track")
    missing: dict[str, Clip] = {}
    indices: dict[str, list[int]] = defaultdict(list)  # files of equal content share their features
    for index, sample in enumerate(samples):
        clip = sample.source
        if clip.audio_track is None:
            clip = replace(clip, audio_track=track)
        try:
            key = cache.key(clip, settings)
        except ClipError as error:
            yield index, error
            continue
        if key not in missing and (features := cache.load(key)) is not None:
            yield index, features
        else:
            missing[key] = clip
            indices[key].append(index)
    with closing(extract_in_processes(missing, cache, settings, workers)) as results:
        for key, result in results:
            for index in indices[key]:
                if isinstance(result, ClipError):
                    clip = samples[index].source
                    if result.problem != "no such track" or clip.audio_track is not None:
                        yield index, ClipError(clip.path, result.problem, result.detail)
                        continue
                    yield index, _other_track(pipeline, samples[index])
                elif (features := cache.load(key)) is None:
                    raise CacheError(f"features were deleted from the cache {cache.folder}: start again")
                else:
                    yield index, features


def _other_track(pipeline: MSAPipeline, sample: Sample) -> ClipFeatures | ClipError:
    """Features of a clip without the audio track of training, which then has the choice of `Clip`."""
    try:
        return pipeline.extract(sample)
    except ClipError as error:
        return error
