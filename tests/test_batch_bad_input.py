"""What generate_many refuses, before any work and by the prompt's index; and a cache that does not fit
memory.
"""

from __future__ import annotations

import pytest
import torch

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.engine.cache import KVCache
from smollm2.errors import UsageError
from smollm2.generation import batch
from smollm2.generation.batch import fit_slots, generate_many
from smollm2.sampling import SamplingParams

TINY = SmolLM2Config.preset("tiny")
# bytes of one token's keys and values in fp32
TOKEN = 2 * TINY.num_hidden_layers * TINY.num_key_value_heads * TINY.head_dim * 4
GOOD = [[1, 2, 3]] * 3


@pytest.fixture(scope="module")
def model():
    return SmolLM2ForCausalLM(TINY, backend="torch").eval()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], [], [2]], {}, "^prompt 1: expected at least one token, got none"),
        ([[1], [2], [3] * 500], {}, r"^prompt 2: expected at most 512 tokens.*got 500 \+ 64; shorten"),
        ([[1] * 510], dict(max_new_tokens=3), r"^prompt 0: .*got 510 \+ 3"),
        ([[1], [2, 512]], {}, r"^prompt 1: expected ids in \[0, 512\), got 512"),
        ([[1], [2, -1]], {}, r"^prompt 1: expected ids in \[0, 512\), got -1"),
        (GOOD, dict(max_new_tokens=0), "^prompt 0: expected max_new_tokens >= 1, got 0"),
        (GOOD, dict(max_new_tokens=[1, 2]), "^max_new_tokens: expected one number or 3 of them, .* got 2"),
        (GOOD, dict(seed=[1]), "^seed: expected one number or 3"),
        (GOOD, dict(slots=0), "^slots: expected a number >= 1, got 0"),
        (GOOD, dict(params=SamplingParams(top_k=513)), "^top_k"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_at_the_call(model, monkeypatch, prompts, options, message):
    monkeypatch.setattr(KVCache, "allocate", None)  # any work would begin with it
    with pytest.raises(UsageError, match=message):
        generate_many(model, prompts, **options)


def test_the_line_states_what_the_slots_and_one_prefill_take():
    cache = KVCache.allocate(TINY, 1, 1, torch.device("cpu"), torch.float32)
    assert cache.keys.nbytes + cache.values.nbytes == TOKEN
    line = f"cache: 8 x 300 tokens, {2 * 8 * 300 * TOKEN / 1e6:.2f} MB"
    assert fit_slots(TINY, 8, 300, torch.float32, None) == (8, line)
    # The prefill of 100 rows is done in parts, of at most 4,096 tokens each.
    line = f"cache: 100 x 300 tokens, {(30_000 + 4096) * TOKEN / 1e6:,.0f} MB"
    assert fit_slots(TINY, 100, 300, torch.float32, None)[1] == line


def test_slots_are_lowered_to_what_fits_and_one_that_does_not_is_refused():
    enough = int((8 + 8) * 300 * TOKEN / 0.9) + 1
    assert fit_slots(TINY, 8, 300, torch.float32, enough)[0] == 8
    fitting, line = fit_slots(TINY, 8, 300, torch.float32, enough - enough // 16 - 1)
    assert fitting == 7 and "slots lowered to 7" in line
    assert fit_slots(TINY, 8, 300, torch.float32, int(2 * 300 * TOKEN / 0.9) + 1)[0] == 1
    message = "one slot of 300 tokens needs .* MB, but .* MB are available .*; shorten the longest prompt"
    with pytest.raises(UsageError, match=message):
        fit_slots(TINY, 8, 300, torch.float32, 300 * TOKEN)


def test_fewer_slots_are_reported_or_warned_of_and_change_no_token(model, monkeypatch):
    options = dict(max_new_tokens=5, params=SamplingParams(temperature=1.0), seed=9, slots=3)
    expected = dict(generate_many(model, GOOD, **options))
    monkeypatch.setattr(batch, "free_memory", lambda device: int(4 * 8 * TOKEN / 0.9) + 1)
    lines: list[str] = []
    assert dict(generate_many(model, GOOD, **options, report=lines.append)) == expected
    assert len(lines) == 1 and "slots lowered to 2" in lines[0]
    with pytest.warns(UserWarning, match="slots lowered to 2"):
        assert dict(generate_many(model, GOOD, **options)) == expected
    monkeypatch.setattr(batch, "free_memory", lambda device: 1000)
    with pytest.raises(UsageError, match="one slot of 8 tokens"):
        generate_many(model, GOOD, **options)
