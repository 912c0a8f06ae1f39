# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import cv2
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, AutoModel

from msa_online import MSAConfig, MSAModel, MSAProcessor
from msa_online.confidence import Confidence
from msa_online.methods import CALIBRATORS, HEADS, MODULATORS
from msa_online.model_card import write_model_card

RESULTS = {
    "text": {"mae": 0.81, "corr": 0.5, "acc2_has0": 0.75, "acc2_non0": 0.7654, "f1_non0": 0.76, "acc7": 0.4},
    "text+audio+vision": {
        "mae": 0.704,
        "corr": 0.6,
        "acc2_has0": 0.8,
        "acc2_non0": 0.82,
        "f1_non0": 0.8,
        "acc7": 0.45,
    },
}
TRAINED_ON = {
    "data": "me/clips",
    "label_column": "sentiment",
    "splits": {"train": 160, "valid": 24, "test": 48},
    "seed": 1111,
    "mixed_precision": "bf16",
    "modulator": "identity",
    "protocol": "single_model",
    "selection": "validation MAE",
    "epoch": 7,
    "skipped_steps": 0,
    "limits": {"text tokens": 128, "seconds of sound": 30.0, "frames": 8},
    "results": {"valid": RESULTS, "test": RESULTS},
    "comparison": ["valid: MAE 0.704; always predicting the mean training label (0.1) gives 1.310"],
    "command": "accelerate launch train.py configs/demo.yaml data.path='my clips'",
}


def card_of(config: MSAConfig, folder: Path) -> tuple[dict, str]:
    """Metadata and text of the card written for `config` into `folder`."""
    write_model_card(folder, config)
    _, metadata, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.fixture
def config(tiny_config) -> MSAConfig:
    return MSAConfig(
        **{
            **tiny_config.to_dict(),
            "text_encoder": "sentence-transformers/all-MiniLM-L6-v2",
            "trained_on": TRAINED_ON,
        }
    )


def test_the_card_says_all_a_reader_needs_to_judge_and_to_repeat(config, tmp_path):
    _, text = card_of(config, tmp_path)
    for fact in (
        "task | regression",
        "a score in [-3, 3]",
        "me/clips",
        "train 160, valid 24, test 48",
        "1111",
        "bf16",
        "late_fusion",
        "all-MiniLM-L6-v2",
        "validation MAE, epoch 7",
        "| reads at most | 128 text tokens, 30 seconds of sound, 8 frames |",
        TRAINED_ON["command"],
    ):
        assert fact in text, fact
    assert "$" not in text


def test_the_card_has_the_scores_of_every_split_under_every_condition(config, tmp_path):
    _, text = card_of(config, tmp_path)
    for split in ("**valid**", "**test**"):
        assert split in text
    rows = [line for line in text.splitlines() if line.startswith(("| text |", "| text+audio+vision |"))]
    assert len(rows) == 4
    assert "0.704" in rows[1] and "80.00" in rows[1] and "82.00" in rows[1] and "0.810" in rows[0]


def test_the_card_shows_the_scores_of_all_conditions_as_a_picture(config, tmp_path):
    _, text = card_of(config, tmp_path)
    assert "![MAE on test by visible modalities (lower is better)](robustness.png)" in text
    height, width, _ = cv2.imread(str(tmp_path / "robustness.png")).shape
    assert width > 900 and height > 200
    one_condition = {**TRAINED_ON, "results": {"test": {"text": RESULTS["text"]}}}
    other = tmp_path / "other"
    other.mkdir()
    _, text = card_of(MSAConfig(**{**config.to_dict(), "trained_on": one_condition}), other)
    assert "![" not in text and not (other / "robustness.png").exists()


def test_the_card_tells_what_training_took_and_claims_no_energy_that_was_not_measured(config, tmp_path):
    effort = {"hours": 0.4213, "steps": 1200, "epochs": 10, "processes": 2, "device": "AMD EPYC 7B13"}
    config.trained_on = {**TRAINED_ON, "effort": effort}
    _, text = card_of(config, tmp_path)
    assert "0.421 hours for 10 epochs (1,200 optimizer steps)" in text
    assert "AMD EPYC 7B13 (2 processes)" in text and "Energy was not measured" in text
    assert "CO2" not in text


@pytest.mark.parametrize("name", sorted(HEADS))
def test_the_card_cites_the_papers_of_the_parts_it_is_made_of(name, config, tmp_path):
    config.head = name
    _, text = card_of(config, tmp_path)
    cited = text.split("## Citation")[1]
    assert HEADS[name].paper in cited and "msa_online" in cited
    others = {kind.paper for kind in {**HEADS, **MODULATORS}.values()} - {HEADS[name].paper, ""}
    assert not any(paper in cited for paper in others)


def test_every_paper_of_a_method_is_in_the_citation_file(repository):
    references = yaml.safe_load((repository / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    papers = {paper["url"]: paper for paper in references}
    named = {
        part.paper for table in (HEADS, MODULATORS, CALIBRATORS) for part in table.values() if part.paper
    }
    for text in named:
        paper = papers[text.rpartition(" ")[2]]
        assert paper["title"] in text and str(paper["year"]) in text
        assert all(author["family-names"] in text for author in paper["authors"])


def test_the_code_in_the_card_runs(config, tmp_path):
    _, text = card_of(config, tmp_path)
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert "from msa_online import MSAPipeline" in code and "MSAPipeline.from_pretrained(" in code
    assert tmp_path.name in code


def test_the_hub_can_read_the_cards_metadata(config, tmp_path):
    metadata, _ = card_of(config, tmp_path)
    assert metadata["library_name"] == "msa_online"
    assert "license" not in metadata  # the data decide what the weights may be used for
    assert metadata["pipeline_tag"] == "video-classification"
    assert metadata["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert metadata["datasets"] == ["me/clips"]
    assert metadata["metrics"] == ["accuracy", "f1", "mae", "pearsonr"]
    assert {"multimodal", "sentiment-analysis", "regression", "late_fusion"} <= set(metadata["tags"])


def test_the_hubs_own_client_reads_the_scores_of_each_condition(config, tmp_path):
    config.audio_encoder = "openai/whisper-tiny.en"
    write_model_card(tmp_path, config, "lab/sentiment", license="cc-by-nc-4.0", languages=["en", "de"])
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.language, data.model_name) == ("cc-by-nc-4.0", ["en", "de"], "sentiment")
    assert data.base_model == ["sentence-transformers/all-MiniLM-L6-v2", "openai/whisper-tiny.en"]
    scores = {
        (one.dataset_config, one.metric_name): one.metric_value
        for one in data.eval_results
        if (one.dataset_type, one.dataset_split) == ("me/clips", "test")
    }
    assert scores["text+audio+vision", "MAE"] == 0.704 and scores["text", "Acc-2 Non0"] == 0.7654
    assert len(scores) == len(data.eval_results) == 12


@pytest.mark.parametrize("encoder", [None, "/home/me/models/bert", "./bert"])
def test_the_card_names_no_base_model_the_hub_does_not_have(config, encoder, tmp_path):
    metadata, _ = card_of(MSAConfig(**{**config.to_dict(), "text_encoder": encoder}), tmp_path)
    assert "base_model" not in metadata


def test_the_card_of_a_model_of_features_says_so_and_promises_no_clips(tmp_path):
    widths = {"text": 1024, "audio": 512, "vision": 1024}
    config = MSAConfig(feature_widths=widths, label_range=[-3, 3], trained_on=TRAINED_ON)
    metadata, text = card_of(config, tmp_path)
    assert "text 1024, audio 512, vision 1024" in text and "msa-online evaluate" in text
    assert "clip.mp4" not in text and "None" not in text
    assert "pipeline_tag" not in metadata and "base_model" not in metadata


def test_the_card_of_a_classifier_lists_its_classes(config, tmp_path):
    classes = {
        "label_range": None,
        "id2label": {0: "angry", 1: "happy"},
        "label2id": {"angry": 0, "happy": 1},
    }
    results = {"test": {"text": {"accuracy": 0.5, "f1_weighted": 0.4, "f1_macro": 0.3}}}
    trained_on = {**TRAINED_ON, "results": results}
    metadata, text = card_of(MSAConfig(**{**config.to_dict(), **classes, "trained_on": trained_on}), tmp_path)
    assert "one of angry, happy" in text and "task | classification" in text and "50.00" in text
    assert "classification" in metadata["tags"]


def test_the_card_shows_what_intervals_were_fitted_and_measured(config, tmp_path):
    assert "## Confidence" not in card_of(config, tmp_path)[1]
    samples = {"nothing": 24, "text": 24, "vision": 12}
    config.confidence = Confidence("valid", samples, half_widths={"nothing": 2.5, "text": 1.25}).to_dict()
    measured = {
        "text": {"samples": 48, "coverage": 0.9167, "width": 2.4},
        "vision": {"samples": 0, "coverage": None, "width": None},
    }
    config.trained_on = {**TRAINED_ON, "confidence": {"test": measured}}
    _, text = card_of(config, tmp_path)
    assert "warning: test" not in text
    assert "90 % of the intervals contain the label" in text
    assert "| text | 24 | 1.250 | 48 | 91.7 | 2.400 |" in text
    assert "| vision | 12 |  | 0 |  |  |" in text
    assert "There are no intervals or calibrated probabilities for vision (12)" in text
    measured["text"]["coverage"] = 0.5
    _, text = card_of(config, tmp_path)
    assert "**warning: test: intervals at 90% contain fewer labels than they should with text (50.0%)" in text


# --- on the Hub ---


class Uploads:
    """The Hub's side of a push: what it is sent, kept by repository and file name."""

    def __init__(self, organisation: str) -> None:
        self.organisation = organisation
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits = 0

    def create_repo(self, repo_id: str, **_) -> "Uploads":
        self.repo_id = repo_id if "/" in repo_id else f"{self.organisation}/{repo_id}"
        self.files.setdefault(self.repo_id, {})
        return self

    def create_commit(self, repo_id: str, operations, **_) -> str:
        self.commits += 1
        for operation in operations:
            self.files[repo_id][operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def hub(monkeypatch) -> Uploads:
    hub = Uploads("me")

    def no_card_yet(*_, **__):
        raise EntryNotFoundError("README.md")

    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: hub)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", no_card_yet)
    return hub


@pytest.mark.parametrize(
    ("asked", "named"), [("lab/sentiment", "lab/sentiment"), ("sentiment", "me/sentiment")]
)
def test_the_card_of_a_pushed_model_names_the_repository(hub, config, asked, named):
    MSAModel(config).push_to_hub(asked)
    card = hub.files[named]["README.md"].decode("utf-8")
    assert f"# {named}\n" in card and f'MSAPipeline.from_pretrained("{named}")' in card
    assert "0.704" in card and "run.yaml" not in card  # which stays at home
    assert {"config.json", "model.safetensors"} < hub.files[named].keys()
    assert hub.commits == 1


def test_saving_with_a_push_publishes_the_same_card(hub, config, tmp_path):
    MSAModel(config).save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="lab/sentiment")
    assert "# lab/sentiment\n" in hub.files["lab/sentiment"]["README.md"].decode("utf-8")


def test_a_model_that_was_never_trained_keeps_the_card_of_transformers(hub, tiny_model):
    tiny_model.push_to_hub("lab/untrained")
    assert b"msa_online" not in hub.files["lab/untrained"]["README.md"]


def test_no_local_path_is_published(hub, tiny_text_encoder, tiny_tokenizer, tmp_path, monkeypatch):
    home = tmp_path / "home" / "me"
    for folder in ("clips", "runs"):
        (home / folder).mkdir(parents=True)
    monkeypatch.chdir(home)
    command = (
        f"accelerate launch train.py configs/demo.yaml data.path={home}/clips '{home}/my configs/a.yaml' "
        f"'model={{text_encoder: {tiny_text_encoder}}}' training.output_dir=../me/runs/mine model.head=ebmc"
    )
    config = MSAConfig(
        text_config=AutoConfig.from_pretrained(tiny_text_encoder),
        text_encoder=str(tiny_text_encoder),
        audio_channels=[16, 16],
        face_channels=8,
        label_range=[-3, 3],
        trained_on={**TRAINED_ON, "data": f"{home}/clips/", "command": command, "seen": ["~/clips", "clips"]},
    )
    model = MSAModel(config)
    assert model.config.text_encoder == str(tiny_text_encoder)  # by which its tokenizer is found
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    MSAProcessor(tiny_tokenizer, {}).save_pretrained(folder)
    write_model_card(folder, model.config)
    model.push_to_hub("lab/sentiment")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    texts = {
        **{path: path.read_text() for path in tmp_path.glob("*/*") if path.suffix in (".json", ".md")},
        **{name: hub.files["lab/sentiment"][name].decode() for name in ("config.json", "README.md")},
    }
    assert len(texts) >= 7
    for name, text in texts.items():
        assert str(tmp_path) not in text and str(tiny_text_encoder.parent) not in text, name
        assert "../" not in text and "~/" not in text, name
    published = json.loads((folder / "config.json").read_text())
    assert published["text_encoder"] == tiny_text_encoder.name
    record = published["trained_on"]
    assert record["data"] == "clips" and record["seen"] == ["clips", "clips"]
    assert record["command"] == (
        "accelerate launch train.py configs/demo.yaml data.path=clips a.yaml "
        f"'model={{text_encoder: {tiny_text_encoder.name}}}' training.output_dir=mine model.head=ebmc"
    )


@pytest.mark.parametrize("name", ["bert-base-uncased", "microsoft/deberta-v3-base"])
def test_names_on_the_hub_stay_whole(name, tiny_config):
    tiny_config.text_encoder = name
    tiny_config.trained_on = {
        "data": "lab/clips",
        "command": "train.py a.yaml data.path=lab/clips 'x=[1, 2]'",
    }
    published = tiny_config.to_dict()
    assert published["text_encoder"] == name
    assert published["trained_on"] == tiny_config.trained_on
