# SPDX-License-Identifier: Apache-2.0
"""Publishing to a server that speaks the Hub's protocol, with the Hub's own client."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from safetensors.torch import save_file

from msa_online import MSAConfig, MSAModel
from msa_online.publishing import PublishError, check_destination, publish
from tests.hub_server import Hub
from tests.test_model_card import TRAINED_ON

HERE = Path(__file__).parent
FEATURES = {"text": 4, "audio": 3, "vision": 2}  # widths


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


class Client:
    """A process whose Hub is the server; one for all tests, because it starts slowly."""

    def __init__(self, address: str, home: Path) -> None:
        self.cache = home / "hub"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "hub_client.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def call(self, name: str, *arguments: str, token: str | None = "hf_me", **options: str):
        environment = {"HF_TOKEN": token} if token else {}
        request = {"call": name, "arguments": arguments, "options": options, "environment": environment}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def publish(self, *words: object, token: str | None = "hf_me") -> str:
        """Publish; returns what was printed."""
        done = self.call("command", "publish", *map(str, words), token=token)
        assert done["status"] == 0, done["err"]
        return done["out"]

    def refusal(self, *words: object, token: str | None = "hf_me") -> str:
        """The one line with which publishing is refused."""
        done = self.call("command", "publish", *map(str, words), token=token)
        assert done["status"] == 1 and done["out"] == ""
        (line,) = done["err"].splitlines()
        return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def shared_client(server, tmp_path_factory) -> Iterator[Client]:
    client = Client(server.address, tmp_path_factory.mktemp("hf_home"))
    yield client
    client.process.stdin.close()
    client.process.wait(60)


@pytest.fixture
def client(shared_client, server) -> Client:
    """The client with an empty cache; the server is empty too."""
    server.reset()
    shutil.rmtree(shared_client.cache, ignore_errors=True)
    return shared_client


@pytest.fixture
def run(tiny_config, tiny_processor, tmp_path) -> Path:
    """The folder of a finished run, with files that stay at home."""
    folder = tmp_path / "run"
    torch.manual_seed(0)
    config = MSAConfig(**{**tiny_config.to_dict(), "trained_on": TRAINED_ON})
    MSAModel(config).eval().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    (folder / "run.yaml").write_text("data: {path: /home/me/clips}\n")
    (folder / "history.json").write_text("[]")
    (folder / "README.md").write_text("# run\n")
    return folder


@pytest.fixture
def batch(make_batch, tmp_path) -> Path:
    path = tmp_path / "batch.safetensors"
    save_file({name: value for name, value in make_batch().items() if name != "labels"}, path)
    return path


def metadata_of(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_what_is_published_opens_elsewhere_and_predicts_the_same(client, server, run, batch):
    printed = client.publish(run, "lab/sentiment", "--license", "cc-by-nc-4.0", "--language", "en")
    repository = server.model("lab/sentiment")
    assert f"{server.address}/lab/sentiment/commit/{repository.branches['main']}" in printed
    assert not client.cache.exists()  # nothing of it was on this machine
    elsewhere = client.call("logits", "lab/sentiment", str(batch), token=None)
    assert elsewhere == client.call("logits", str(run), str(batch)) and len(elsewhere) == 4


def test_one_commit_holds_all_files_and_no_others(client, server, run):
    client.publish(run, "lab/sentiment")
    repository = server.model("lab/sentiment")
    assert repository.messages == ["initial commit", "Publish a checkpoint of msa_online"]
    files = repository.files()
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} < files.keys()
    assert {"README.md", "robustness.png"} < files.keys()
    assert not {"run.yaml", "history.json"} & files.keys()
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert b"# lab/sentiment\n" in files["README.md"]
    assert not any(b"/home/me" in content for content in files.values())
    assert (run / "README.md").read_text() == "# run\n"


def test_the_card_has_the_licence_and_the_languages_that_were_given(client, server, run):
    client.publish(run, "lab/sentiment", "--license", "cc-by-4.0", "--language", "en", "--language", "de")
    card = server.model("lab/sentiment").files()["README.md"]
    metadata = metadata_of(card)
    assert (metadata["license"], metadata["language"]) == ("cc-by-4.0", ["en", "de"])
    assert b"Languages: en, de." in card


def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_uploaded(client, server, run):
    message = client.refusal(run, "lab/sentiment", "--license", "mine")
    assert "license" in message and '"mine"' in message
    assert server.model("lab/sentiment").messages == ["initial commit"] and not server.blobs


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, "no access token"), ("hf_wrong", "does not accept your token"), ("hf_reader", "write token")],
)
def test_without_a_token_that_may_write_the_remedy_is_named(client, server, run, token, words):
    message = client.refusal(run, "lab/sentiment", token=token)
    assert message.startswith("lab/sentiment: ") and words in message
    assert "hf auth login" in message and "HF_TOKEN" in message
    assert not server.repositories and not server.blobs


def test_a_namespace_of_others_is_refused_with_those_that_are_allowed(client, server, run):
    message = client.refusal(run, "lab/sentiment", token="hf_other")
    assert "does not belong to lab" in message and "other/..." in message
    assert not server.repositories


def test_a_private_repository_opens_with_a_token_only(client, server, run, batch):
    client.publish(run, "lab/secret", "--private")
    assert server.model("lab/secret").private
    shutil.rmtree(client.cache, ignore_errors=True)
    refused = client.call("logits", "lab/secret", str(batch), token=None)
    assert "lab/secret" in refused["error"] and "\n" not in refused["error"]
    assert len(client.call("logits", "lab/secret", str(batch))) == 4


def test_a_public_repository_is_not_taken_for_a_private_one(client, server, run):
    client.publish(run, "lab/sentiment")
    assert "exists and is public" in client.refusal(run, "lab/sentiment", "--private")


def test_an_existing_repository_is_updated_and_keeps_what_is_not_ours(client, server, run, tiny_config):
    client.publish(run, "lab/sentiment", "--license", "mit")
    repository = server.model("lab/sentiment")
    card = repository.files()["README.md"].replace(b"license: mit", b"license: mit\nthumbnail: face.png")
    repository.commit("main", {**repository.files(), "README.md": card, "demo.mp4": b"clip"}, "by hand")
    config = MSAConfig(**{**tiny_config.to_dict(), "trained_on": {**TRAINED_ON, "seed": 1112}})
    MSAModel(config).save_pretrained(run)
    client.publish(run, "lab/sentiment", "--language", "en")
    files = repository.files()
    assert files["demo.mp4"] == b"clip"
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    metadata = metadata_of(files["README.md"])
    assert (metadata["license"], metadata["thumbnail"], metadata["language"]) == ("mit", "face.png", ["en"])
    assert b"| seed | 1112 |" in files["README.md"]
    client.publish(run, "lab/sentiment", "--license", "cc-by-4.0")
    assert metadata_of(repository.files()["README.md"])["license"] == "cc-by-4.0"


def test_publishing_the_same_again_makes_no_commit(client, server, run):
    client.publish(run, "lab/sentiment")
    client.publish(run, "lab/sentiment")
    assert len(server.model("lab/sentiment").messages) == 2


def test_a_revision_is_a_branch_of_its_own(client, server, run, batch, tiny_config):
    client.publish(run, "lab/sentiment")
    first = client.call("logits", "lab/sentiment", str(batch))
    torch.manual_seed(1)
    config = MSAConfig(**{**tiny_config.to_dict(), "trained_on": TRAINED_ON})
    MSAModel(config).save_pretrained(run)
    client.publish(run, "lab/sentiment", "--revision", "v2")
    second = client.call("logits", str(run), str(batch))
    shutil.rmtree(client.cache)
    assert client.call("logits", "lab/sentiment", str(batch)) == first
    assert client.call("logits", "lab/sentiment", str(batch), revision="v2") == second != first
    assert "neither" in client.call("logits", "lab/sentiment", str(batch), revision="v3")["error"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b'{"model_type": "bert"}'}, "a checkpoint of type 'bert', not 'msa_online'"),
        ({"config.json": b"[]", "a.bin": b""}, "a checkpoint of type 'unknown'"),
        ({"model.gguf": b"GGUF"}, "contains something else (model.gguf)"),
    ],
)
def test_a_repository_that_is_not_ours_is_left_as_it_is(client, server, run, files, words):
    server.add("models/lab/bert", {"README.md": b"# theirs\n", **files})
    assert words in client.refusal(run, "lab/bert")
    assert server.model("lab/bert").messages == ["initial commit"] and not server.blobs


def test_a_network_that_is_gone_half_way_leaves_nothing_half_published(client, server, run, batch):
    client.publish(run, "lab/sentiment")
    before = client.call("logits", "lab/sentiment", str(batch))
    model = MSAModel.from_pretrained(run)
    with torch.no_grad():
        model.head.classifier.bias.add_(1)
    model.save_pretrained(run)
    server.broken = "/commit/"
    message = client.refusal(run, "lab/sentiment", "--license", "mit", "--language", "en")
    assert "the connection to the Hub failed" in message and "Nothing is half-published" in message
    assert f"msa-online publish {run} lab/sentiment --license mit --language en (" in message
    shutil.rmtree(client.cache)
    assert client.call("logits", "lab/sentiment", str(batch)) == before
    server.broken, sent = None, len(server.requests)
    client.publish(run, "lab/sentiment")
    assert not any(request.startswith("PUT /lfs/") for request in server.requests[sent:])  # it was there
    assert len(server.model("lab/sentiment").messages) == 3


def test_the_command_to_go_on_keeps_a_private_repository_private(client, server, run):
    server.broken = "/api/repos/create"
    assert "lab/secret --private (" in client.refusal(run, "lab/secret", "--private")
    assert not server.repositories


def test_an_unfinished_run_or_something_else_is_refused_without_asking_the_hub(client, server, run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "trained_on": None}))
    assert "no record of training" in client.refusal(run, "lab/sentiment")
    assert "config.json is missing" in client.refusal(tmp_path, "lab/sentiment")
    assert "no such folder" in client.refusal(tmp_path / "nowhere", "lab/sentiment")
    (run / "config.json").write_text(json.dumps(config))
    (run / "model.safetensors").unlink()
    assert "the weights" in client.refusal(run, "lab/sentiment")
    assert not server.requests


@pytest.mark.parametrize("name", ["sentiment", "a/b/c", "lab/", "lab/..", "la b/x"])
def test_a_name_that_no_repository_has_is_refused(client, run, name):
    assert name in client.refusal(run, name)


@pytest.fixture
def configuration(tmp_path) -> Path:
    """A run on ten samples of features that publishes its checkpoint to lab/features."""
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "features.npz",
        id=np.array([f"s{number}" for number in range(10)]),
        label=random.uniform(-3, 3, size=10),
        split=np.array(["train"] * 6 + ["valid"] * 2 + ["test"] * 2),
        **{name: random.normal(size=(10, 3, width)) for name, width in FEATURES.items()},
    )
    document = {
        "model": {"feature_widths": FEATURES, "head_kwargs": {"hidden_size": 8}},
        "data": {"path": str(tmp_path / "features.npz")},
        "training": {
            "output_dir": str(tmp_path / "trained"),
            "epochs": 1,
            "log_with": None,
            "push_to_hub": "lab/features",
            "hub_private": True,
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_run_publishes_its_checkpoint_at_the_end(client, server, configuration):
    done = client.call("command", "train", str(configuration))
    assert done["status"] == 0, done["err"]
    assert f"published: {server.address}/lab/features/commit/" in done["out"]
    repository = server.model("lab/features")
    assert repository.private and len(repository.messages) == 2
    card = repository.files()["README.md"].decode()
    assert "msa-online evaluate lab/features FEATURES" in card and "Energy was not measured" in card
    assert str(configuration.parent) not in card


def test_a_run_that_may_not_publish_is_refused_before_its_data_are_read(client, server, configuration):
    words = ("train", str(configuration), "data.path=/nowhere")
    done = client.call("command", *words, token="hf_other")
    assert done["status"] == 1 and "does not belong to lab" in done["err"]
    assert "nowhere" not in done["err"] and not server.repositories


# --- a Space ---


def test_a_space_serves_the_checkpoint_with_the_code_that_wrote_it(client, server, run, tmp_path):
    client.publish(run, "lab/sentiment", "--space")
    files = server.repositories["spaces/lab/sentiment"].files()
    front = metadata_of(files["README.md"])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", ["lab/sentiment"])
    required = {Requirement(line).name for line in files["requirements.txt"].decode().splitlines()[1:]}
    assert {"torch", "transformers", "mediapipe"} <= required and "msa_online" not in required
    for name, content in files.items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (words,) = re.findall(r"main\((\[.*\])\)", files["app.py"].decode())
    code = f"from msa_online_cli import *; print(build_parser().parse_args({words}), PACKAGE)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "space",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lab/sentiment" in done.stdout and str(tmp_path / "space" / "msa_online") in done.stdout
    client.publish(run, "lab/sentiment", "--space")  # updates it


def test_a_space_with_another_app_is_left_as_it_is(client, server, run):
    server.add("spaces/lab/sentiment", {"app.py": b"print('theirs')\n"})
    done = client.call("command", "publish", str(run), "lab/sentiment", "--space")
    assert done["status"] == 1 and "contains another app" in done["err"]
    assert server.repositories["spaces/lab/sentiment"].messages == ["initial commit"]


# --- without any server ---


def test_a_hub_that_is_switched_off_is_named_at_once(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (lambda: publish(run, "lab/sentiment"), lambda: check_destination("lab/sentiment")):
        with pytest.raises(PublishError, match="lab/sentiment: the Hub cannot be reached: HF_HUB_OFFLINE"):
            call()


def test_the_endpoint_that_the_user_set_is_asked_and_named_if_it_is_no_address(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "my-mirror")
    with pytest.raises(PublishError, match="HF_ENDPOINT=my-mirror is no address"):
        check_destination("lab/sentiment")
