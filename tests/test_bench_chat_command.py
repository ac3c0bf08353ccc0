"""The benchmark of turns: it reads everything once, and then the question alone."""

from __future__ import annotations

import json

from chat_cases import chat_checkpoint
from in_process import printed

from bench import chat


def test_it_records_both_ways_and_how_much_each_read(tmp_path):
    model, path = chat_checkpoint(tmp_path / "model"), tmp_path / "chat.json"
    flags = "--model", model, "--device", "cpu", "--tokens", "50,300", "--rounds", "2", "--json", path
    out = printed(chat.main, *flags)
    rows = json.loads(path.read_text())["first_piece"]
    assert len(rows) == 2 and rows[1]["tokens"] > 300 and f"{rows[1]['tokens']} tokens" in out
    for row in rows:
        assert row["read"]["nothing kept"] > row["read"]["kept"] > 0
        assert [len(seconds) for seconds in row["seconds"].values()] == [2, 2]
    assert rows[0]["read"]["kept"] == rows[1]["read"]["kept"], "the question, however long the conversation"
