# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from msa_online.evaluation.metrics import classification_metrics, regression_metrics
from msa_online.evaluation.tables import (
    HEADLINES,
    as_markdown,
    conditions_table,
    epoch_line,
    format_metric,
    frame_rates_table,
    markdown_table,
    open_console,
    shares_table,
    show,
)

REGRESSION = {
    "text": regression_metrics(
        [2.0, -1.0, 0.4, -0.4, 1.0], [3.0, -2.0, 0.0, 1.0, 1.0]
    ),  # MAE 0.76, Has0 4/5, Non0 3/4
    "text+audio+vision": regression_metrics([3.0, -2.0, 0.0, 1.0, 2.0], [3.0, -2.0, 0.0, 1.0, 1.0]),
}
CLASSIFICATION = {"audio": classification_metrics([0, 1, 1], [0, 1, 0], num_classes=2)}  # accuracy 2/3


def rendered(table, width: int = 400) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


@pytest.mark.parametrize(
    ("name", "value", "printed"),
    [
        ("mae", 0.70449, "0.704"),
        ("corr", -0.0123, "-0.012"),
        ("acc7", 0.46504, "46.50"),
        ("acc2_non0", 1.0, "100.00"),
        ("f1_weighted", 0.5, "50.00"),
        ("f1_non0", math.nan, "nan"),
    ],
)
def test_shares_are_printed_in_percent_and_errors_in_units_of_the_label(name, value, printed):
    assert format_metric(name, value) == printed


def test_a_markdown_table_has_a_row_for_each_condition_and_a_column_for_each_headline():
    header, ruler, *rows = cells(markdown_table(REGRESSION))
    assert header[0] == "modalities" and len(set(map(len, (header, ruler, *rows)))) == 1
    assert [row[0] for row in rows] == ["text", "text+audio+vision"]
    by_name = dict(zip(header, rows[0], strict=True))
    assert by_name[HEADLINES["mae"]] == "0.760"
    assert by_name[HEADLINES["acc2_has0"]] == "80.00"
    assert by_name[HEADLINES["acc2_non0"]] == "75.00"
    assert by_name[HEADLINES["acc7"]] == "40.00"
    assert all(set(mark) <= set(":-") for mark in ruler)


def test_scores_at_missing_rates_stand_below_those_of_the_conditions():
    *_, last = cells(markdown_table({"imr": REGRESSION["text"], **REGRESSION}))
    assert last[:2] == ["imr", "0.760"]


def test_a_classification_shows_its_own_metrics():
    header, _, row = cells(markdown_table(CLASSIFICATION))
    assert dict(zip(header, row, strict=True))[HEADLINES["accuracy"]] == "66.67"
    assert HEADLINES["mae"] not in header


def test_the_terminal_shows_what_the_model_card_shows():
    text = rendered(conditions_table(REGRESSION, "test, best epoch 3"))
    assert "test, best epoch 3" in text
    for row in cells(markdown_table(REGRESSION)):
        assert all(cell in text for cell in row if not set(cell) <= set(":-")), row


def test_a_table_can_be_read_on_a_terminal_of_eighty_columns():
    text = rendered(conditions_table(REGRESSION, "test"), width=80)
    assert "0.760" in text and "80.00" in text and "40.00" in text
    assert "text+audio+vision" in text  # on one line, not broken
    assert len(text.splitlines()) <= 12


def test_a_sweep_is_shown_rate_by_rate_with_its_mean_last():
    sweep = {"0.0": REGRESSION["text+audio+vision"], "0.1": REGRESSION["text"], "mean": REGRESSION["text"]}
    lines = [line for line in rendered(frame_rates_table(sweep, "test")).splitlines() if "0.760" in line]
    assert ["0.1" in lines[0], "mean" in lines[1]] == [True, True]


def test_a_title_is_printed_as_it_is():
    assert "runs/[old] on test" in rendered(conditions_table(REGRESSION, "runs/[old] on test"))


def test_the_line_of_an_epoch_says_losses_metrics_and_whether_it_is_the_best():
    line = epoch_line("epoch 2/10", {"loss": 1.25, "task": 1.0}, REGRESSION["text"], best=True, skipped=0)
    assert line.startswith("epoch 2/10") and "\n" not in line
    assert "loss 1.250" in line and "task 1.000" in line and "mae 0.760" in line and "acc7 40.00" in line
    assert line.endswith("best so far")


def test_skipped_steps_are_counted_and_only_the_best_epoch_is_marked():
    line = epoch_line("epoch 2/10", {"loss": 1.25}, REGRESSION["text"], best=False, skipped=3)
    assert "3 steps skipped" in line and "best" not in line


def test_diagnostics_do_not_crowd_the_line_of_an_epoch():
    losses = {"loss": 1.25, "energy/text": 0.5, "trust/audio": 0.25}
    line = epoch_line("epoch 2/10", losses, REGRESSION["text"], best=True, skipped=0)
    assert "loss 1.250" in line and "energy" not in line and "trust" not in line


def test_shares_are_shown_in_percent_and_contributions_with_their_sign():
    shares = {"text": 0.625, "audio": 0.125, "vision": 0.25}
    means = {"mean/text": 0.5, "mean/audio": -0.0625, "mean/vision": 0.0}
    lines = rendered(shares_table(shares | means, "runs/[old] on test")).splitlines()
    assert "runs/[old] on test" in lines[0]
    text, audio, vision = (next(line.split() for line in lines if name in line) for name in shares)
    assert "62.5" in text and "+0.500" in text
    assert "12.5" in audio and "-0.062" in audio
    assert "25.0" in vision and "+0.000" in vision


def test_a_bar_in_a_name_does_not_add_a_column_to_a_markdown_table():
    assert as_markdown(["variant", "MAE"], [["a|b", "0.5"]]).splitlines()[-1] == r"| a\|b | 0.5 |"


LONG = "/recordings/of a laboratory/with a name that is longer than/any terminal of eighty columns/runs/[old]"


def shown(width: int | None, monkeypatch, capsys) -> str:
    """A table with a long title, printed where the output is no terminal."""
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    show(conditions_table(REGRESSION, f"{LONG} on test"), open_console())
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [None, 80, 40])
def test_a_title_with_a_long_path_is_one_line_however_wide_the_table_is(width, monkeypatch, capsys):
    assert f"{LONG} on test" in shown(width, monkeypatch, capsys).splitlines()


def test_a_name_in_a_table_is_whole_where_the_output_is_a_pipe(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("file", "problem")
    table.add_row(Text(LONG), "no face")
    console = open_console()
    show(table, console)
    assert LONG in capsys.readouterr().out


def test_the_width_that_the_environment_asks_for_holds(monkeypatch, capsys):
    lines = shown(80, monkeypatch, capsys).splitlines()
    assert max(map(len, lines[1:])) <= 80 and "75.00" in "".join(lines)


def test_a_quiet_console_of_another_process_prints_nothing(capsys):
    show(conditions_table(REGRESSION, "test"), open_console(quiet=True))
    assert capsys.readouterr().out == ""
