# SPDX-License-Identifier: Apache-2.0
"""Dialogue context: turns see their own dialogue, in order, and nothing else."""

import math

import pytest
import torch
from torch import Tensor, nn

from msa_online import MSAConfig, MSAModel
from msa_online.context import CONTEXTS, FARTHEST
from msa_online.hub import load_for_fine_tuning
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online_cli import main
from tests.equations import assert_equation

WIDTHS = {"text": 6, "audio": 5, "vision": 4}
DIALOGUE = torch.tensor([4, 4, 7, 4, 1, 7, 7, 2, 4])  # of 4, 3, 1 and 1 turns, mixed in the batch
TURN = torch.tensor([2, 0, 1, 1, 0, 0, 2, 0, 3])
SPEAKER = torch.tensor([0, 0, 1, 1, 0, 0, 2, 0, 0])  # one speaks again in dialogue 4; three speak in 7
SAMPLES = len(TURN)
KINDS = [name for name in CONTEXTS if name != "none"]
every_kind = pytest.mark.parametrize("kind", KINDS)
together_or_not = pytest.mark.parametrize("joint", [False, True])
heads = pytest.mark.parametrize(
    "head", ["late_fusion", pytest.param("ebmc", marks=pytest.mark.needs("ebmc"))]
)


def make_model(kind: str, head: str = "late_fusion", trained: bool = True, **settings) -> MSAModel:
    """A small model in float64, whose context and head are moved off their start."""
    torch.manual_seed(0)
    kwargs = {"hidden_size": 8} | ({"depth": 1} if head == "ebmc" else {})
    config = MSAConfig(
        feature_widths=WIDTHS,
        head=head,
        head_kwargs=kwargs,
        context=kind,
        context_kwargs={} if kind == "none" else {"hidden_size": 8, **settings},
    )
    model = MSAModel(config).double().eval()
    if trained:
        with torch.no_grad():
            for part in (model.context, model.head):
                for parameter in part.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def make_dialogues(seed: int = 0) -> dict[str, Tensor]:
    """A batch of four dialogues; every third modality of a turn is missing."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"dialogue": DIALOGUE, "turn": TURN, "speaker": SPEAKER}
    batch["modality_present"] = (torch.arange(3 * SAMPLES).reshape(SAMPLES, 3) % 4) > 0
    for name, width in WIDTHS.items():
        batch[f"{name}_values"] = torch.randn(SAMPLES, 4, width, generator=generator).double()
        batch[f"{name}_mask"] = torch.arange(4) < torch.randint(1, 5, (SAMPLES, 1), generator=generator)
    return batch


def with_others(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The same batch in which the samples `rows` `(batch,)` bool have other inputs."""
    other = make_dialogues(seed=1)
    return {
        key: torch.where(rows.reshape(-1, *[1] * (value.ndim - 1)), other[key], value)
        for key, value in batch.items()
    }


def taken(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def moved(model: MSAModel, batch: dict[str, Tensor], other: dict[str, Tensor]) -> list[bool]:
    """Which samples are predicted differently."""
    return (model(**other).logits != model(**batch).logits).any(dim=-1).tolist()


# which turns reach which outputs


@heads
@every_kind
@together_or_not
def test_a_turn_sees_its_dialogue_and_no_other(kind, joint, head):
    model, batch = make_model(kind, head, joint=joint), make_dialogues()
    for dialogue in (4, 7, 1):
        inside = dialogue == DIALOGUE
        assert moved(model, batch, with_others(batch, inside)) == inside.tolist()


@heads
@every_kind
@together_or_not
def test_a_causal_context_sees_no_later_turn(kind, joint, head):
    model, batch = make_model(kind, head, joint=joint, causal=True), make_dialogues()
    for turn in range(4):
        changed = (DIALOGUE == 4) & (turn == TURN)
        from_there_on = (DIALOGUE == 4) & (turn <= TURN)
        assert moved(model, batch, with_others(batch, changed)) == from_there_on.tolist()


@every_kind
def test_without_causal_a_turn_sees_later_ones(kind):
    model, batch = make_model(kind), make_dialogues()
    assert moved(model, batch, with_others(batch, TURN == 3)) == (DIALOGUE == 4).tolist()


@every_kind
@together_or_not
def test_batches_and_padding_change_nothing(kind, joint):
    """Each dialogue alone, without longer ones beside it; and the samples of a batch in another order."""
    model, batch = make_model(kind, joint=joint), make_dialogues()
    together = model(**batch).logits
    for dialogue in DIALOGUE.unique():
        rows = torch.nonzero(dialogue == DIALOGUE).flatten()
        torch.testing.assert_close(model(**taken(batch, rows)).logits, together[rows], atol=1e-12, rtol=0)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(**taken(batch, order)).logits, together[order], atol=1e-12, rtol=0)


@every_kind
def test_a_clip_without_a_dialogue_is_a_dialogue_of_one(kind):
    model, batch = make_model(kind), make_dialogues()
    alone = {key: value for key, value in batch.items() if key not in ("dialogue", "turn", "speaker")}
    one_each = {**batch, "dialogue": torch.arange(SAMPLES), "turn": torch.zeros_like(TURN)}
    torch.testing.assert_close(model(**alone).logits, model(**one_each).logits, atol=1e-12, rtol=0)
    assert moved(model, batch, one_each) == ((DIALOGUE == 4) | (DIALOGUE == 7)).tolist()


# speakers


@together_or_not
def test_a_graph_asks_who_speaks_again_and_not_for_names(joint):
    model, batch = make_model("graph", joint=joint), make_dialogues()
    renamed = torch.tensor([7, 3, 0])[SPEAKER]
    assert not any(moved(model, batch, {**batch, "speaker": renamed}))
    another = torch.where((DIALOGUE == 4) & (TURN == 3), 1, SPEAKER)  # now the second one speaks again
    assert moved(model, batch, {**batch, "speaker": another}) == (DIALOGUE == 4).tolist()


def test_a_graph_of_turns_without_speakers_is_refused():
    batch = make_dialogues()
    del batch["speaker"]
    with pytest.raises(ValueError, match="a graph of turns needs their speakers"):
        make_model("graph")(**batch)


# absence


@heads
@every_kind
@together_or_not
def test_what_is_hidden_from_a_turn_is_hidden_from_its_neighbours(kind, joint, head):
    model, batch = make_model(kind, head, joint=joint), make_dialogues()
    other = make_dialogues(seed=1)
    for column, name in enumerate(MODALITIES):
        hidden = ~batch["modality_present"][:, column]
        assert hidden.any()
        rows = hidden[:, None, None]
        values = torch.where(rows, other[f"{name}_values"], batch[f"{name}_values"])
        assert not any(moved(model, batch, {**batch, f"{name}_values": values}))


@every_kind
@together_or_not
@pytest.mark.parametrize("seen", [[False] * 3, [True, False, False], [False, True, True]], ids=str)
def test_any_modalities_of_a_dialogue_may_be_missing(kind, joint, seen):
    model, batch = make_model(kind, joint=joint), make_dialogues()
    batch["modality_present"] = torch.tensor(seen).expand(SAMPLES, 3)
    output = model(**batch, labels=torch.zeros(SAMPLES).double())
    output.loss.backward()
    assert output.logits.isfinite().all()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@heads
@every_kind
def test_a_modality_alone_is_predicted_from_itself_alone_unless_they_are_read_together(kind, head):
    batch, rows = make_dialogues(), DIALOGUE == 4
    changed = with_others(batch, rows)
    for joint in (False, True):
        model = make_model(kind, head, joint=joint)
        for name in MODALITIES:
            own = {key: batch[key] for key in (f"{name}_values", f"{name}_mask")}
            found, expected = (model(**each).modality_logits[name] for each in ({**changed, **own}, batch))
            assert torch.equal(found, expected) != joint


@every_kind
def test_read_together_a_turn_learns_what_it_lacks_from_its_neighbours(kind):
    """Turn 1 has no text; the text of turn 0 reaches it by its sound."""
    batch = make_dialogues()
    batch["modality_present"] = torch.ones(SAMPLES, 3, dtype=torch.bool)
    batch["modality_present"][TURN > 0, 0] = False
    first = (DIALOGUE == 4) & (TURN == 0)
    other = {**batch, "text_values": torch.where(first[:, None, None], 2 * batch["text_values"] ** 2, 0.0)}
    for joint in (False, True):
        model = make_model(kind, joint=joint, causal=True)
        found = torch.tensor(moved(model, batch, other))
        assert found[first].all() and found[(DIALOGUE == 4) & (TURN == 1)].all() == joint


# equations


def by_hand(model: MSAModel, sequences: dict[str, ModalitySequence], causal: bool, joint: bool, network):
    """(20.1) to (20.3), one dialogue at a time; `network(prefix, states, present, ...)` is (20.2)."""
    weights = model.context.exchange.state_dict()
    result = {name: sequence.values.clone() for name, sequence in sequences.items()}
    for dialogue in DIALOGUE.unique():
        rows = [int(row) for row in torch.argsort(TURN) if DIALOGUE[row] == dialogue]
        states, present, speakers = {}, {}, SPEAKER[rows].tolist()
        for name in MODALITIES:
            sequence = sequences[name]
            present[name] = [bool(sequence.present[row]) for row in rows]
            states[name] = []
            for row in rows:
                if not sequence.present[row]:
                    states[name].append(torch.zeros(8).double())
                    continue
                mean = sequence.values[row][sequence.mask[row]].mean(dim=0)
                scaled = nn.functional.layer_norm(
                    mean,
                    mean.shape,
                    weights[f"read.{name}.0.weight"],
                    weights[f"read.{name}.0.bias"],
                )
                states[name].append(
                    weights[f"read.{name}.1.weight"] @ scaled + weights[f"read.{name}.1.bias"]
                )
        for name in MODALITIES:
            if joint:
                inputs = [sum(states[each][turn] for each in MODALITIES) for turn in range(len(rows))]
                seen = [any(present[each][turn] for each in MODALITIES) for turn in range(len(rows))]
                context = network("networks.joint", inputs, seen, causal, speakers)
            else:
                context = network(f"networks.{name}", states[name], present[name], causal, speakers)
            for row, added in zip(rows, context, strict=True):
                steps = sequences[name].mask[row]
                result[name][row][steps] += weights[f"write.{name}.weight"] @ added
    return result


def gru_by_hand(weights: dict[str, Tensor]):
    """(20.4): the equations of a GRU of width 8, step by step."""

    def pass_over(prefix: str, inputs: list[Tensor]) -> list[Tensor]:
        state, states = torch.zeros(8).double(), []
        w, r = weights[f"{prefix}.weight_ih_l0"], weights[f"{prefix}.weight_hh_l0"]
        b, c = weights[f"{prefix}.bias_ih_l0"], weights[f"{prefix}.bias_hh_l0"]
        for each in inputs:
            reset_i, update_i, new_i = (w @ each + b).chunk(3)
            reset_h, update_h, new_h = (r @ state + c).chunk(3)
            reset, update = torch.sigmoid(reset_i + reset_h), torch.sigmoid(update_i + update_h)
            state = (1 - update) * torch.tanh(new_i + reset * new_h) + update * state
            states.append(state)
        return states

    def network(prefix: str, inputs: list[Tensor], present: list[bool], causal: bool, speakers: list[int]):
        before = pass_over(f"{prefix}.forwards", inputs)
        if causal:
            return before
        after = pass_over(f"{prefix}.backwards", inputs[::-1])[::-1]
        return [torch.cat(pair) for pair in zip(before, after, strict=True)]

    return network


def transformer_by_hand(weights: dict[str, Tensor]):
    """(20.5): one query and one head at a time."""

    def linear(name: str, values: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ values + weights[f"{name}.bias"]

    def norm(name: str, values: Tensor) -> Tensor:
        return nn.functional.layer_norm(
            values, values.shape, weights[f"{name}.weight"], weights[f"{name}.bias"]
        )

    def network(prefix: str, inputs: list[Tensor], present: list[bool], causal: bool, speakers: list[int]):
        states = inputs
        for number in range(2):
            layer = f"{prefix}.layers.{number}"
            parts = [linear(f"{layer}.query_key_value", norm(f"{layer}.norm", each)) for each in states]
            queries, keys, values = ([part[8 * at : 8 * at + 8] for part in parts] for at in range(3))
            passed = []
            for i, state in enumerate(states):
                attended = []
                for head in range(4):
                    places = slice(2 * head, 2 * head + 2)
                    logits = []
                    for j in range(len(states)):
                        seen = (present[j] or i == j) and not (causal and j > i)
                        nearest = (-1, -2, -3, -4)[head] if causal else (-1, 1, -2, 2)[head]
                        learned = weights[f"{prefix}.bias.weight"][j - i + FARTHEST, head]
                        bias = learned - abs(j - i - nearest)
                        product = queries[i][places] @ keys[j][places] / math.sqrt(2) + bias
                        logits.append(product if seen else torch.tensor(-math.inf).double())
                    shares = torch.stack(logits).softmax(dim=0)
                    attended.append(sum(s * v[places] for s, v in zip(shares, values, strict=True)))
                state = state + linear(f"{layer}.merge", torch.cat(attended))
                inner = nn.functional.gelu(
                    linear(f"{layer}.perceptron.1", norm(f"{layer}.perceptron.0", state))
                )
                passed.append(state + linear(f"{layer}.perceptron.3", inner))
            states = passed
        return states

    return network


def graph_by_hand(weights: dict[str, Tensor]):
    """(20.7) to (20.10), with a window of one: one turn and one neighbour at a time."""
    recurrence = gru_by_hand(weights)

    def times(name: str, values: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ values + weights.get(f"{name}.bias", 0.0)

    def mean(values: list[Tensor]) -> Tensor:
        return sum(values) / len(values)

    def network(prefix: str, inputs: list[Tensor], present: list[bool], causal: bool, speakers: list[int]):
        nodes = recurrence(f"{prefix}.order", inputs, present, causal, speakers)
        turns = range(len(nodes))
        near = [[j for j in turns if abs(i - j) <= 1 and not (causal and j > i)] for i in turns]
        kinds = {
            "order": lambda i, j: 0 if j == i else 1 if j < i else 2,
            "speaker": lambda i, j: 0 if speakers[i] == speakers[j] else 1,
        }
        total = [torch.zeros(8).double() for _ in turns]
        for name, kind in kinds.items():
            graph = f"{prefix}.graphs.{name}"
            local = []
            for i in turns:
                local.append(times(f"{graph}.own", nodes[i]))
                for relation in range(3 if name == "order" and not causal else 2):
                    of_relation = [nodes[j] for j in near[i] if kind(i, j) == relation]
                    if of_relation:
                        local[i] = local[i] + times(f"{graph}.by_relation.{relation}", mean(of_relation))
            spread = [
                times(f"{graph}.keep", local[i]) + times(f"{graph}.gather", mean([local[j] for j in near[i]]))
                for i in turns
            ]
            pairs = [torch.cat(pair) for pair in zip(nodes, spread, strict=True)]
            read = recurrence(f"{graph}.order", pairs, present, causal, speakers)
            total = [
                sum_ + times(f"{graph}.merge", state).relu() for sum_, state in zip(total, read, strict=True)
            ]
        return total

    return network


BY_HAND = {
    "gru": ("20.4", gru_by_hand, {}),
    "transformer": ("20.5", transformer_by_hand, {}),
    "graph": ("20.10", graph_by_hand, {"window": 1}),
}


@every_kind
@together_or_not
@pytest.mark.parametrize("causal", [False, True])
def test_the_context_is_that_of_the_equations(kind, joint, causal):
    equation, make_network, settings = BY_HAND[kind]
    model, batch = make_model(kind, joint=joint, causal=causal, **settings), make_dialogues()
    sequences = model.encode(**batch)
    network = make_network(model.context.exchange.state_dict())
    with torch.no_grad():
        found = {name: sequence.values for name, sequence in model.context(sequences).items()}
        expected = by_hand(model, sequences, causal, joint, network)
    for name in MODALITIES:
        assert_equation(equation, f"states of {name} that the head reads", found[name], expected[name])


# as a part of a model


@heads
@every_kind
@together_or_not
def test_a_new_context_changes_nothing_and_adds_to_no_other_part(kind, joint, head):
    model, plain = make_model(kind, head, trained=False, joint=joint), make_model("none", head)
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert all(name.startswith("context.exchange.") for name in found.missing_keys)
    batch = make_dialogues()
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


@every_kind
def test_a_context_that_is_added_to_a_checkpoint_starts_as_one_of_a_new_model(kind, tmp_path):
    make_model("none").float().save_pretrained(tmp_path)
    config = make_model(kind, trained=False).config
    added = load_for_fine_tuning(tmp_path, config).model.context.named_parameters()
    new = dict(make_model(kind, trained=False).context.named_parameters())
    for name, parameter in added:
        found, usual = parameter.abs().max(), new[name].abs().max()
        assert usual / 3 <= found <= 3 * usual, name  # both are zero, or neither is


@every_kind
@together_or_not
def test_every_parameter_learns(kind, joint):
    model = make_model(kind, joint=joint)
    model(**make_dialogues(), labels=torch.linspace(-2, 2, SAMPLES).double()).loss.backward()
    idle = [name for name, parameter in model.context.named_parameters() if not parameter.grad.any()]
    assert idle == []


@every_kind
def test_the_context_of_a_modality_belongs_to_it_unless_they_share_one(kind):
    for joint in (False, True):
        model = make_model(kind, joint=joint)
        owned = model.modality_parameters()
        counted = [id(parameter) for parameters in owned.values() for parameter in parameters]
        of_context = {id(parameter) for parameter in model.context.parameters()}
        assert len(counted) == len(set(counted))
        assert of_context & set(counted) == (set() if joint else of_context)


@every_kind
def test_a_saved_model_predicts_the_same(kind, tmp_path):
    model, batch = make_model(kind).float(), make_dialogues()
    batch |= {key: value.float() for key, value in batch.items() if key.endswith("_values")}
    model.save_pretrained(tmp_path)
    loaded = MSAModel.from_pretrained(tmp_path).eval()
    assert loaded.config.dialogue_turns == 128
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_it_predicts_about_the_same(kind, dtype):
    model, batch = make_model(kind).float(), make_dialogues()
    batch |= {key: value.float() for key, value in batch.items() if key.endswith("_values")}
    expected = model(**batch).logits
    with torch.autocast("cpu", dtype):
        mixed = model(**batch).logits
    narrow = model.to(dtype)(**batch).logits
    assert narrow.dtype == dtype
    for found in (mixed, narrow):
        torch.testing.assert_close(found.float(), expected, atol=0.15, rtol=0.1)


def test_predict_says_that_clips_are_judged_alone(tiny_config, tiny_processor, tmp_path, capsys):
    config = MSAConfig(**tiny_config.to_dict(), context="gru")
    MSAModel(config).save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    assert main(["predict", "--model", str(tmp_path), "--text", "I loved it", "--json"]) == 0
    assert "trained on whole dialogues; here each clip is a dialogue of one" in capsys.readouterr().err


def test_a_model_without_context_saves_no_setting_of_one():
    assert not [key for key in make_model("none", trained=False).config.to_dict() if "context" in key]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gru", {"layers": 0}, "layers=0 must be at least 1"),
        ("gru", {"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ("graph", {"window": 0}, "window=0 must be at least 1"),
        ("transformer", {"heads": 3}, "hidden_size=8 is not a multiple of heads=3"),
        ("lstm", {}, "unknown context 'lstm'; known are graph, gru, none, transformer"),
    ],
)
def test_impossible_settings_are_named(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(kind, **settings)
    with pytest.raises(ValueError, match=r"model\.context_turns is 0: at least 1"):
        MSAConfig(feature_widths=WIDTHS, context_turns=0)
