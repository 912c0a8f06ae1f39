# SPDX-License-Identifier: Apache-2.0
"""States of a frozen text encoder for the tokens of a pickle that has no text features (`text_bert`)."""

from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.corpus import CorpusError
from msa_online.encoders import load_encoder_config
from msa_online.encoders.pretrained import load_tokenizer
from msa_online.encoders.text import TextEncoder
from msa_online.precomputed.corpus import FeatureSteps
from msa_online.precomputed.files import FeatureTable
from msa_online.precomputed.states import TOGETHER


def text_states(table: FeatureTable, encoder_name: str) -> FeatureSteps:
    """Compute the states of the last layer for all tokens of a table, special tokens included.

    A sample of special tokens only has no text.

    Args:
        table: Rows with `tokens`.
        encoder_name: Folder or name of the text encoder; its tokenizer must have made the tokens.

    Raises:
        CorpusError: The tokens are not those of the encoder's tokenizer, or too many for the encoder.
        EncoderError: The encoder or its tokenizer is unavailable.
    """
    config = MSAConfig(text_encoder=encoder_name, text_config=load_encoder_config("text", encoder_name))
    encoder = TextEncoder.from_config(config)
    tokenizer = load_tokenizer(encoder_name)
    ids = _checked_ids(table, encoder, tokenizer, encoder_name)
    encoder.load_pretrained(encoder_name)
    encoder.freeze()
    states = [np.zeros((0, config.widths["text"]), np.float32)] * len(ids)
    rows = sorted((row for row in range(len(ids)) if len(ids[row])), key=lambda row: -len(ids[row]))
    batches = [rows[at : at + TOGETHER["text"]] for at in range(0, len(rows), TOGETHER["text"])]
    for batch in track(batches, "computing states of text", transient=True, console=Console(stderr=True)):
        for row, computed in zip(batch, _states(encoder, [ids[row] for row in batch]), strict=True):
            states[row] = computed
    return FeatureSteps.join(states, config.widths["text"])


@torch.inference_mode()
def _states(encoder: TextEncoder, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """States `(tokens, width)` of each text of a batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = torch.tensor([len(each) for each in ids])
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(each) for each in ids], batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(-1)
    inputs = {"text_input_ids": padded.to(device), "text_mask": mask.to(device)}
    values = encoder.to(device).states(inputs).values.cpu()
    return [of_text[:length].numpy() for of_text, length in zip(values, lengths.tolist(), strict=True)]


def _checked_ids(
    table: FeatureTable, encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase, encoder_name: str
) -> list[np.ndarray]:
    """Token ids of each sample, `(tokens,)` int64, without padding; none for a text of special tokens."""
    source = table.metadata.path
    if table.tokens.width != 3:
        raise CorpusError(
            f"{source}: text_bert has {table.tokens.width} rows in each sample: token ids, attention mask "
            "and segments are needed"
        )
    written = [table.tokens.of(row).numpy() for row in range(len(table.metadata.rows))]
    ids = [tokens[tokens[:, 1] != 0, 0] for tokens in written]  # fp32 is exact up to 16 million
    names = [cells["id"] for _, cells in table.metadata.rows]
    size = encoder.model.get_input_embeddings().num_embeddings
    if outside := [row for row, of_row in enumerate(ids) if not _are_ids(of_row, size)]:
        wrong = next(value for value in ids[outside[0]] if not _are_ids(value, size))
        raise CorpusError(
            f"{source}: text_bert of {names[outside[0]]!r} has the token id {wrong:g} ({len(outside):,} such "
            f"samples), and {encoder_name} has the ids 0 to {size - 1:,}: name the encoder that the tokens "
            "were made for"
        )
    if (longest := max(map(len, ids), default=0)) > encoder.longest:
        raise CorpusError(
            f"{source}: text_bert has up to {longest} tokens and {encoder_name} reads {encoder.longest:g}: "
            "name the encoder that the tokens were made for"
        )
    _require_tokenizer(table, ids, tokenizer, encoder_name)
    around = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    empty = [np.isin(of_row, [each for each in around if each is not None]).all() for of_row in ids]
    return [
        np.zeros(0, np.int64) if without else of_row.astype(np.int64)
        for of_row, without in zip(ids, empty, strict=True)
    ]


def _are_ids(values: np.ndarray, size: int) -> bool:
    return bool(((values >= 0) & (values < size) & (values == np.round(values))).all())


def _require_tokenizer(
    table: FeatureTable, ids: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase, encoder_name: str
) -> None:
    """Check that a tokenizer makes the tokens of most samples from their texts, where these are known.

    Ids of another vocabulary look alike, and the encoder would read other words. A text may have been cut or
    cleaned, so single texts may differ.
    """
    written = [
        (row, cells) for row, (_, cells) in enumerate(table.metadata.rows) if cells.get("text", "").strip()
    ]
    if not written:
        return
    made = tokenizer([cells["text"] for _, cells in written], verbose=False)["input_ids"]
    differing = []
    for (row, cells), expected in zip(written, made, strict=True):
        shared = min(len(expected), len(ids[row])) - 1  # a text that was cut may end with another token
        if not np.array_equal(expected[:shared], ids[row][:shared]):
            differing.append(cells["id"])
    if 2 * len(differing) > len(written):
        raise CorpusError(
            f"{table.metadata.path}: the tokens in text_bert are not what the tokenizer of {encoder_name} "
            f"makes of raw_text in {len(differing):,} of {len(written):,} samples, for example "
            f"{differing[0]!r}: name the encoder that the tokens were made for"
        )
