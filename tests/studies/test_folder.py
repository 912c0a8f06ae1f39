# SPDX-License-Identifier: Apache-2.0
"""The folder of a study or a search belongs to one process."""

import pytest

from msa_online.studies.folder import held, require_writable
from msa_online.training.yaml_reader import ConfigurationError


def test_a_folder_that_is_held_is_refused_until_its_holder_ends(tmp_path):
    folder = tmp_path / "runs" / "study"
    with (
        held(folder),
        pytest.raises(ConfigurationError, match="another process is working there"),
        held(folder),
    ):
        pass
    with held(folder):
        assert folder.is_dir()


def test_what_goes_wrong_while_a_folder_is_held_is_not_taken_for_another_process(tmp_path):
    with pytest.raises(BlockingIOError, match="a full pipe"), held(tmp_path):
        raise BlockingIOError("a full pipe")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "notes").write_text("a file")
    for folder in (tmp_path / "notes", tmp_path / "notes" / "study"):
        with pytest.raises(ConfigurationError, match="output_dir=.*notes.* cannot be written: .* a file"):
            require_writable(folder)
