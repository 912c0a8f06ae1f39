# SPDX-License-Identifier: Apache-2.0
"""Several clients at once get answers and see their place in the queue; a page that fails is reported."""

import importlib
import socket

from msa_online import MSAPipeline
from msa_online.page.serving import running_page


def test_clients_at_once_are_answered_without_an_error(
    tiny_model, tiny_processor, make_clip, tmp_path, repository, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    main = importlib.import_module("load_test_page").main
    clip = str(make_clip(tmp_path / "a.mp4", seconds=0.6, fps=10))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    visitors = [clip, "--clients", "4", "--seconds", "2", "--address", f"http://127.0.0.1:{port}"]
    with MSAPipeline(tiny_model, tiny_processor) as pipeline, running_page(pipeline, "tiny", port=port):
        assert main(visitors) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 clients: ") and ", 0 errors" in printed
    assert main(visitors) == 1  # the page is gone
    assert "0 answers, 4 errors" in capsys.readouterr().out
