# SPDX-License-Identifier: Apache-2.0
"""Publish the checkpoint of a run to the Hugging Face Hub, in one commit."""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.requirements import Requirement

from feature_extractors.clip import printable
from feature_extractors.sources import why_hub_is_silent
from msa_online.configuration_msa import MSAConfig
from msa_online.extras import why_not_installed
from msa_online.hub import UNREADABLE, load_config, require_own_weights
from msa_online.model_card import REPOSITORY, write_model_card
from msa_online.modeling_msa import MSAModel
from msa_online.processing_msa import MSAProcessor

WEIGHTS = "model*.safetensors*"  # with the index of several files
OF_EVERY_REPOSITORY = {".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"}
WRITTEN = {  # metadata that describe this checkpoint; others in the card of the repository are kept
    *("base_model", "datasets", "library_name", "metrics", "model-index", "model_name", "pipeline_tag"),
    *("tags", "eval_results"),
}
LOG_IN = (
    "run `hf auth login`, or set HF_TOKEN to a token with write access "
    "(https://huggingface.co/settings/tokens)"
)
CONNECTION_ERROR = HfHubHTTPError.__bases__[0]  # of the HTTP library below, which differs between versions
FAILURES = (CONNECTION_ERROR, OSError, ValueError, RuntimeError)
"""Errors of the Hub's client: of the network, of files, of answers; RuntimeError wraps that of an upload."""


SOURCE = Path(__file__).parents[1]
"""Folder of the packages."""

SPACE_MARK = "# Written by `msa-online publish --space`."
SPACE_APP = (
    SPACE_MARK
    + """
import sys

from msa_online_cli import main

sys.exit(main(["serve", {repository}, "--host", "0.0.0.0", "--port", "7860", "--examples"]))
"""
)
SPACE_CARD = """\
---
title: Sentiment of a video clip
emoji: 🎬
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
models:
- {repository}
tags:
- msa_online
---

Try [{repository}](https://huggingface.co/{repository}): give a short clip of one person who talks. Clips are
deleted when you leave. The page is `msa-online serve`; its code is in this repository.
"""


class PublishError(ValueError):
    """A checkpoint cannot be published; the message says why, and how to go on."""


def publish(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    license: str | None = None,
    languages: Sequence[str] = (),
    revision: str | None = None,
) -> str:
    """Upload weights, configuration, processor and model card of a finished run.

    All files are in one commit, so the repository never has a part of them. Files that a checkpoint does not
    have, and metadata that this card does not write, stay as they are in an existing repository.

    Args:
        folder: Folder of the run.
        repository: Name on the Hub, "ORG/NAME"; it is created if it does not exist.
        private: Create the repository as a private one.
        license: Licence of the weights, as the Hub abbreviates it; by default that of an existing card.
        languages: Languages of the data, as codes; by default those of an existing card.
        revision: Branch to publish to, created if it does not exist; by default "main".

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: `folder` is not a checkpoint, or it is damaged.
        PublishError: The run has not finished; there is no access, or no network; or the repository contains
            something else.
    """
    config = _finished(folder)
    given = {"--license": [license], "--language": languages, "--revision": [revision]}
    options = [word for name, values in given.items() for value in values if value for word in (name, value)]
    words = ["msa-online", "publish", str(folder), repository, *options, *["--private"] * private]
    again = shlex.join(words)
    with TemporaryDirectory(prefix="msa_online_") as temporary, _explained(repository, again):
        staging = Path(temporary)
        config.save_pretrained(staging)
        if config.feature_widths is None:
            _read_processor(folder).save_pretrained(staging)
        hub = HfApi()
        kept = _kept_metadata(hub, repository, revision) if _check(hub, repository, private) else {}
        former_license, former = kept.pop("license", None), kept.pop("language", None) or ()
        write_model_card(
            staging,
            config,
            repository,
            license=license or former_license,
            languages=languages or ([former] if isinstance(former, str) else former),
        )
        if kept:
            card = ModelCard.load(staging / "README.md")
            for name, value in kept.items():
                card.data[name] = value
            card.save(staging / "README.md")
        files = [*staging.iterdir(), *folder.glob(WEIGHTS)]
        hub.create_repo(repository, private=private or None, exist_ok=True)
        if revision:
            hub.create_branch(repository, branch=revision, exist_ok=True)
        commit = hub.create_commit(
            repository,
            [CommitOperationAdd(file.name, file) for file in sorted(files)],
            commit_message="Publish a checkpoint of msa_online",
            revision=revision,
        )
    return commit.commit_url


def check_space(folder: Path, repository: str, private: bool = False) -> None:
    """Check, before a checkpoint is published, that a page for it could be; changes nothing.

    Raises:
        PublishError: The model does not take clips; gradio is not installed, so that the version to run with
            is unknown; or the Space exists and contains something else, or is public.
    """
    if load_config(folder).feature_widths is not None:
        raise PublishError(f"{folder}: the model takes precomputed features, not clips: leave --space out")
    if missing := why_not_installed("gradio"):
        raise PublishError(f"a Space runs the installed version of gradio: {missing}")
    with _explained(f"Space {repository}"):
        try:
            info = HfApi().space_info(repository)
        except RepositoryNotFoundError:
            return
        if private and not info.private:
            raise PublishError(
                f"Space {repository}: it exists and is public: make it private in its settings on the Hub"
            )
        files = {file.rfilename for file in info.siblings} - OF_EVERY_REPOSITORY
        if files and not _is_ours(repository, files):
            raise PublishError(f"Space {repository}: it contains another app and is left as it is")


def publish_space(repository: str, *, private: bool = False) -> str:
    """Publish a Space with a page to try a published checkpoint, `msa-online serve`.

    It has the name of the checkpoint's repository, and contains the code of this package, so that it runs the
    version that wrote it.

    Args:
        repository: Repository of the checkpoint.
        private: Create a private Space, which reads a private checkpoint with its secret HF_TOKEN.

    Returns:
        Address of the commit.

    Raises:
        PublishError: There is no access, or no network.
    """
    written = {
        "app.py": SPACE_APP.format(repository=json.dumps(repository)),
        "README.md": SPACE_CARD.format(repository=repository, gradio=version("gradio")),
        "requirements.txt": _space_requirements(),
    }
    code = {path.relative_to(SOURCE).as_posix(): path for path in _own_files()}
    with _explained(f"Space {repository}", "the same command"):
        hub = HfApi()
        hub.create_repo(
            repository, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True
        )
        commit = hub.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, text.encode()) for name, text in written.items()),
                *(CommitOperationAdd(name, path) for name, path in sorted(code.items())),
            ],
            commit_message="Publish a page for a checkpoint of msa_online",
            repo_type="space",
        )
    return commit.commit_url


def _is_ours(repository: str, files: set[str]) -> bool:
    """Whether a Space was written by `publish_space`."""
    if "app.py" not in files:
        return False
    app = Path(HfApi().hf_hub_download(repository, "app.py", repo_type="space"))
    return app.read_text(encoding="utf-8").startswith(SPACE_MARK)


def _own_files() -> Iterator[Path]:
    """Files of the installed package."""
    yield SOURCE / "msa_online_cli.py"
    for package in ("msa_online", "feature_extractors"):
        for path in (SOURCE / package).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".typed"):
                yield path


def _space_requirements() -> str:
    """What the package and its page require; the Space's SDK brings gradio itself."""
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    for text in requires("msa_online") or ():
        requirement = Requirement(text)
        marker = requirement.marker
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("serve", "demo"))
        if wanted and requirement.name != "gradio":
            requirement.marker = None
            lines.append(str(requirement))
    return "\n".join(lines) + "\n"


def check_destination(repository: str, private: bool = False) -> None:
    """Check, before training, that a checkpoint could be published; changes nothing.

    Raises:
        PublishError: As in `publish`.
    """
    with _explained(repository):
        _check(HfApi(), repository, private)


def _finished(folder: Path) -> MSAConfig:
    """Configuration of the checkpoint in `folder`, whose weights match it."""
    if not folder.is_dir():
        raise PublishError(f"{printable(folder)}: no such folder: give that of a finished run")
    config = load_config(folder)
    if not config.trained_on:
        raise PublishError(
            f"{folder}: config.json has no record of training: wait until the run has finished, or continue "
            "it with training.resume=true"
        )
    if not any(folder.glob(WEIGHTS)):
        raise PublishError(f"{folder}: the weights, model.safetensors, are missing: publish the run's folder")
    try:
        with torch.device("meta"):
            model = MSAModel(config)
    except ValueError as error:  # of a plug-in
        raise PublishError(f"{folder}: no model can be built from it ({error})") from error
    require_own_weights(folder, model)
    return config


def _read_processor(folder: Path) -> MSAProcessor:
    try:
        return MSAProcessor.from_pretrained(folder, local_files_only=True)
    except UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PublishError(f"{folder}: its processor cannot be read ({reason})") from error


def _check(hub: HfApi, repository: str, private: bool) -> bool:
    """Check access to a repository and its content; returns whether it exists."""
    if not REPOSITORY.fullmatch(repository):
        raise PublishError(f"{printable(repository)!r} is no repository: give a name like ORG/NAME")
    if silence := why_hub_is_silent():
        raise PublishError(f"{repository}: the Hub cannot be reached: {silence}")
    user = hub.whoami()
    namespaces = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
    if (owner := repository.partition("/")[0]) not in namespaces:
        raise PublishError(
            f"{repository}: your token may not write there: it is of {user['name']}, who does not belong "
            f"to {owner}; you can publish to {', '.join(f'{name}/...' for name in namespaces)}"
        )
    try:
        info = hub.model_info(repository)
    except RepositoryNotFoundError:
        return False
    if private and not info.private:
        raise PublishError(
            f"{repository}: it exists and is public: make it private in its settings on the Hub, or name "
            "another one"
        )
    files = {file.rfilename for file in info.siblings}
    kind = _type_of(hub, repository) if "config.json" in files else None
    if kind is not None and kind != MSAConfig.model_type:
        raise PublishError(
            f"{repository}: it contains a checkpoint of type {kind!r}, not {MSAConfig.model_type!r}, and is "
            "left as it is: name another one"
        )
    if kind is None and (others := sorted(files - OF_EVERY_REPOSITORY)):
        raise PublishError(
            f"{repository}: it contains something else ({', '.join(others[:3])}) and is left as it is: name "
            "another one"
        )
    return True


def _type_of(hub: HfApi, repository: str) -> str:
    """Type of the model that a repository's config.json describes."""
    text = Path(hub.hf_hub_download(repository, "config.json")).read_text(encoding="utf-8")
    try:
        return str(json.loads(text)["model_type"])
    except (ValueError, LookupError, TypeError):
        return "unknown"


def _kept_metadata(hub: HfApi, repository: str, revision: str | None) -> dict[str, Any]:
    """Metadata in the card of an existing repository that do not describe the checkpoint."""
    try:
        path = hub.hf_hub_download(repository, "README.md", revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return {}
    card = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    return {name: value for name, value in card.data.to_dict().items() if name not in WRITTEN}


@contextmanager
def _explained(repository: str, again: str | None = None) -> Iterator[None]:
    """Convert errors of the Hub's client to one line with a remedy; `again` is the command to repeat."""
    try:
        yield
    except PublishError:
        raise
    except FAILURES as error:
        message = f"{repository}: {_reason(error)}"
        if again and _is_interruption(error):
            message += (
                ". Nothing is half-published, because one commit holds all files. To go on: "
                f"{again} (files that have arrived are not sent again)"
            )
        raise PublishError(message) from error


def _is_interruption(error: Exception) -> bool:
    """Whether the same command may succeed later: the network failed, or the server."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, CONNECTION_ERROR | RuntimeError)


def _reason(error: Exception) -> str:
    """Why the Hub's client failed, in one line."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, FAILURES):  # of an upload
        return _reason(error.__cause__)
    if isinstance(error, LocalTokenNotFoundError):
        return f"no access token: {LOG_IN}"
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or " ".join(str(error).split())
        status = error.response.status_code
        if status == 401:
            return f"the Hub does not accept your token: {LOG_IN}"
        if status == 403:
            return f"your token may not write there ({said}): {LOG_IN}"
        return f"the Hub refuses ({status}: {said})"
    if isinstance(error, CONNECTION_ERROR):
        return f"the connection to the Hub failed ({' '.join(str(error).split()) or type(error).__name__})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return " ".join(str(error).split())
