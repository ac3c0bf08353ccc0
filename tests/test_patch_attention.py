"""attn_implementation="smollm2": what each mask, cache and option of transformers comes to."""

import pytest
import torch
from patch_cases import TINY, batch, llama, packed, transformers

from kernels import TORCH
from smollm2 import patch
from smollm2.errors import UsageError
from smollm2.patch import apply_kernels
from smollm2.patch.attention import Kernels

IDS = batch(rows=3, length=12)[0]
LEFT, HOLES = torch.ones_like(IDS), torch.ones_like(IDS)
LEFT[0, :4] = LEFT[2, :1] = HOLES[1, 3:5] = 0
RIGHT = LEFT.flip(1)
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture
def pair():
    """A plain Llama and one with our attention alone, in evaluation, and the calls of attention."""
    return llama().eval(), apply_kernels(llama().eval(), backend="torch", **dict.fromkeys(
        ("rms_norm", "rope", "swiglu", "loss"), False))  # fmt: skip


@pytest.fixture
def seen(pair, monkeypatch):
    """What our attention was called with: (operation, mask)."""
    calls = []

    def noting(name):
        def call(q, k, v, mask=None, **options):
            calls.append((name, mask))
            return getattr(TORCH, name)(q, k, v, mask, **options)

        return call

    ops = {name: noting(name) for name in ("attention", "decode_attention")}
    kernels = Kernels(frozenset({"attention"}), "torch", {"cpu": type("Ops", (), {
        name: staticmethod(call) for name, call in ops.items()
    })})  # fmt: skip
    for layer in pair[1].model.layers:
        layer.self_attn._smollm2 = kernels
    return calls


def same(pair, compute):
    with torch.no_grad():
        expected, ours = (compute(model) for model in pair)
    torch.testing.assert_close(ours, expected, **CLOSE)


def at_real(mask):
    return lambda model: model(IDS, attention_mask=mask).logits[mask.bool()]


def test_a_full_row_needs_no_mask(pair, seen):
    same(pair, lambda model: model(IDS).logits)
    same(pair, lambda model: model(IDS, attention_mask=torch.ones_like(IDS)).logits)
    assert seen == [("attention", None)] * 4


def test_documents_are_where_positions_begin_anew(pair, seen):
    positions, start = packed(IDS)
    same(pair, lambda model: model(IDS, position_ids=positions, use_cache=False).logits)
    assert len(seen) == 2 and all(torch.equal(mask, start.int()) for _, mask in seen)
    changed = IDS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    with torch.no_grad():
        one, other = (pair[1](ids, position_ids=positions, use_cache=False).logits for ids in (IDS, changed))
    assert torch.equal(one[:, 6:], other[:, 6:]) and not torch.equal(one[:, 0], other[:, 0])


def test_documents_are_what_cu_seq_lens_count(pair, seen):
    """Over all rows together, as flash attention counts; transformers' other attentions do not read them."""
    positions, start = packed(IDS)
    plain, ours = pair
    begins = (positions.flatten() == 0).nonzero().flatten().int()
    cumulative = torch.cat((begins, torch.tensor([IDS.numel()], dtype=torch.int32)))
    with torch.no_grad():
        expected = plain(IDS, position_ids=positions, use_cache=False).logits
        found = ours(IDS, position_ids=positions, cu_seq_lens_q=cumulative, cu_seq_lens_k=cumulative).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    assert all(torch.equal(mask, start.int()) for _, mask in seen)
    with pytest.raises(UsageError, match="as many keys as the 1 queries, got 13"):
        cache = ours(IDS, use_cache=True).past_key_values
        ours(IDS[:, :1], past_key_values=cache, cu_seq_lens_q=cumulative)


def test_padding(pair, seen):
    same(pair, at_real(RIGHT))
    assert [mask for _, mask in seen] == [None, None]  # no real token sees it
    same(pair, at_real(LEFT))
    assert torch.equal(seen[-1][1], torch.tensor([4, 0, 1], dtype=torch.int32)[:, None].expand(3, 12))
    count = len(seen)
    same(pair, at_real(HOLES))
    same(pair, lambda model: model(IDS, attention_mask=torch.ones(3, 1, 12, 12).tril().bool()).logits)
    assert len(seen) == count, "torch's attention takes a whole mask"


def continued(mask=None, **kinds):
    """Logits of a prompt in two pieces and of one token more, over a cache."""

    def compute(model):
        cache = kinds["static"](model) if kinds else transformers.DynamicCache()
        found = []
        for first, last in ((0, 5), (5, 9), (9, 10)):
            known = None if mask is None else mask[:, :last]
            out = model(IDS[:, first:last], past_key_values=cache, attention_mask=known)
            found.append(out.logits)
        return torch.cat(found[1:], 1)

    return compute


def test_a_growing_cache(pair, seen):
    same(pair, continued())
    assert [name for name, _ in seen] == ["attention"] * 4 + ["decode_attention"] * 2
    del seen[:]
    same(pair, continued(LEFT))
    assert [name for name, _ in seen] == ["attention"] * 6


def test_a_static_cache_has_keys_after_the_last_query(pair, seen):
    fixed = lambda model: transformers.StaticCache(config=model.config, max_cache_len=12)  # noqa: E731
    same(pair, continued(static=fixed))
    assert seen == []


@pytest.mark.parametrize("options", [
    {}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"},
], ids=str)  # fmt: skip
def test_greedy_tokens(options):
    plain, ours = llama().eval(), apply_kernels(llama().eval(), backend="torch")
    options = dict(options, attention_mask=LEFT, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(IDS, **options), plain.generate(IDS, **options))


def test_another_scale(pair, seen):
    for model in pair:
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.05
    same(pair, continued())
    assert {name for name, _ in seen} == {"attention"}, "the decode kernel has the usual scale only"


def test_dropout_in_training_is_torchs(pair, seen):
    positions, _ = packed(IDS)
    for model in pair:
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout, layer.self_attn.scaling = 1e-7, 0.05
    same(pair, lambda model: model(IDS, position_ids=positions, use_cache=False).logits)
    for layer in pair[1].model.layers:
        layer.self_attn.attention_dropout = 0.5
    one, other = (pair[1](IDS).logits for _ in range(2))
    assert not torch.equal(one, other)
    assert seen == []


@pytest.mark.parametrize(("kind", "changes"), [
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("Mistral", {"sliding_window": 4}), ("Qwen3", {"head_dim": 32}),
])  # fmt: skip
def test_other_architectures_by_the_name_alone(kind, changes, monkeypatch):
    monkeypatch.setattr(patch.attention, "interpreted", lambda: False)
    patch.register.cache_clear()
    patch.register()
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        model.set_attn_implementation("smollm2")
        torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)
    patch.register.cache_clear()


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_other_models_add_is_refused(pair, name):
    with pytest.raises(UsageError, match=f"expected no {name}; use sdpa or eager"):
        pair[1](IDS, **{name: 1.0})
