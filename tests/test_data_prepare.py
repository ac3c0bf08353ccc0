"""`python -m train.prepare`: fills the cache in the order of the run, continues, checks, and says what is
wrong.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from train_cases import DEADLINE

from smollm2.errors import UsageError
from train import prepare

BASE = (
    "model=tiny data=local tokenizer=train vocab_size=300 sequence_length=32 batch_size=2 eval_batches=1 "
    "workers=0"
).split()


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "corpus").mkdir()
    for shard in range(6):
        lines = [
            json.dumps({"text": f"Sentence {shard}.{index} of a small corpus. " * 3}) for index in range(50)
        ] + ['{"text": ""}']
        (tmp_path / "corpus" / f"{shard}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [*BASE, f"paths={tmp_path / 'corpus'}", f"token_cache={tmp_path / 'cache'}"]


def test_all_of_an_epoch_is_stored_once_and_verified(arguments, tmp_path, capsys):
    assert prepare.main([*arguments, "steps=100000"]) == 0
    out = capsys.readouterr().out
    assert (
        "6 blocks, 306 documents (6 of them unusable)" in out
        and "tokenised now" in out
        and str(tmp_path / "cache") in out
    )
    assert prepare.main([*arguments, "steps=100000"]) == 0
    assert "all of it was there already" in capsys.readouterr().out
    assert prepare.main([*arguments, "--verify"]) == 0
    assert "0 damaged blocks" in capsys.readouterr().out
    (file,) = tmp_path.glob("cache/*/*/*/shard-00003.tokens")
    file.write_bytes(b"\0" * file.stat().st_size)
    assert prepare.main([*arguments, "--verify"]) == 1
    out = capsys.readouterr().out
    assert "shard-00003.tokens: block 0 is damaged" in out and "1 damaged blocks; the next run" in out
    assert prepare.main([*arguments, "steps=100000"]) == 0
    assert prepare.main([*arguments, "--verify"]) == 0


def test_it_stops_at_the_tokens_that_were_asked_for(arguments, capsys):
    assert prepare.main([*arguments, "--tokens", "1_000"]) == 0
    assert "\n1 blocks" in capsys.readouterr().out


def test_what_cannot_be_prepared_is_said(arguments, capsys):
    with pytest.raises(UsageError, match="expected a folder to fill, got auto with data=local"):
        prepare.main([argument for argument in arguments if not argument.startswith("token_cache")])
    with pytest.raises(UsageError, match="token_cache: expected a folder outside of paths"):
        prepare.main([*arguments[:-1], f"{arguments[-2].replace('paths', 'token_cache')}/cache"])
    for wrong in (["--tokens"], ["--tokens", "many"], ["--tokens", "0"]):
        with pytest.raises(UsageError, match="--tokens: expected a number above 0"):
            prepare.main([*arguments, *wrong])
    assert prepare.main(["--help"]) == 0
    assert "--verify" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_command_continues(arguments, tmp_path, project_root):
    text = "Words of a longer corpus, which takes a while. " * 400
    lines = [json.dumps({"text": f"{index} {text}"}) + "\n" for index in range(150)]
    (tmp_path / "corpus" / "long.jsonl").write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "train.prepare", *arguments, "workers=1", "steps=1000000"]
    process = subprocess.Popen(
        command, cwd=project_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background jobs ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    assert "held-out documents" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert "456 documents (6 of them unusable)" in done.stdout
