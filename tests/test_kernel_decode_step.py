"""The two ends of a decode step: what they compute is exact, so it is compared bit for bit; they write what
they own and nothing else, and a row does not depend on the others.
"""

import re

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    PLACE,
    TORCH,
    TRITON,
    angles,
    assert_same,
    configured_for,
    draw,
    far,
    gap,
    inner,
)  # fmt: skip

from kernels.decode_step import _decode_inputs, _next_token, decode_inputs, next_token
from kernels.types import NOT_FINITE, TokenState

pytestmark = pytest.mark.usefixtures("poison_empty")

PAD = 77
INF, NAN = float("inf"), float("nan")


def integers(*values):
    return torch.tensor(values, device=DEVICE)


# decode_inputs


def given(batch=3, new=1, width=96, half=16, vocabulary=50, positions=20, dtype=torch.float32):
    """Tokens, embedding, lengths and both tables; the first and the last row of each table are asked for."""
    tokens = torch.randint(vocabulary, (batch, new), device=DEVICE)
    lengths = torch.randint(positions - new + 1, (batch,), device=DEVICE)
    if batch > 1:
        tokens[0, 0], tokens[-1, -1], lengths[0], lengths[-1] = 0, vocabulary - 1, 0, positions - new
    return tokens, draw(vocabulary, width, dtype=dtype), lengths, *angles(positions, half)


def begun(ops, tokens, embedding, lengths, cos, sin):
    """All that a call gives and writes; the lengths that it was given stay."""
    lengths = lengths.clone()
    return *ops.decode_inputs(tokens, embedding, lengths, cos, sin), lengths


def same_inputs(*tensors):
    ours = begun(TRITON, *tensors)
    assert_same(ours, begun(TORCH, *tensors))
    assert all(x.is_contiguous() for x in ours)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 960, 2048])
def test_models_widths(width, dtype):
    same_inputs(*given(2, width=width, half=32, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, new", [(1, 1), (1, 16), (5, 3), (33, 1)])
def test_rows_and_tokens(batch, new, dtype):
    *_, lengths = same_inputs(*given(batch, new, positions=64, dtype=dtype))
    assert lengths.min() >= new


@pytest.mark.parametrize("width, half", [(1, 1), (33, 5), (97, 48), (1025, 3)])
def test_any_width_and_head_dim(width, half):
    same_inputs(*given(width=width, half=half))


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_other_integers_views_and_a_gap_between_rows(integer):
    tokens, embedding, lengths, cos, sin = given(new=2)
    tokens, lengths = gap(tokens, dim=1).to(integer), lengths.to(integer)
    for layout in (inner, lambda x: gap(x, dim=1), lambda x: x.t().contiguous().t()):
        ours = same_inputs(tokens, layout(embedding), lengths, inner(cos), gap(sin))
        assert ours[-1].dtype == integer


def test_a_row_alone_is_the_row_in_a_batch():
    tokens, embedding, lengths, *tables = given(9)
    batch = begun(TRITON, tokens, embedding, lengths, *tables)
    for rows in ([0], [8], [4, 1, 7]):
        alone = begun(TRITON, tokens[rows], embedding, lengths[rows], *tables)
        assert_same(alone, [x[rows] for x in batch])


def test_what_lies_outside_of_its_table_is_nan_and_nothing_else_is():
    """Whole logits of it are NaN, for which `next_token` has a mark."""
    tokens, embedding, lengths, *tables = given(6)
    inside = begun(TRITON, tokens, embedding, lengths, *tables)
    tokens[1], tokens[2], lengths[3], lengths[4] = -1, 50, -1, 20
    x, cos, sin, after = begun(TRITON, tokens, embedding, lengths, *tables)
    good = [0, 5]
    assert_same([y[good] for y in (x, cos, sin, after)], [y[good] for y in inside])
    assert x[[1, 2]].isnan().all() and not x[[0, 3, 4, 5]].isnan().any()
    for table in (cos, sin):
        assert table[[3, 4]].isnan().all() and not table[[0, 1, 2, 5]].isnan().any()
    assert_same([after], [lengths + 1])


def test_steps_go_on_where_the_last_one_ended():
    tokens, embedding, lengths, cos, sin = given(2, positions=64)
    lengths.zero_()
    for position in range(3):
        _, row_cos, row_sin = decode_inputs(tokens, embedding, lengths, cos, sin)
        assert_same([row_cos[:, 0], row_sin[:, 0]], [table[position].expand(2, -1) for table in (cos, sin)])
    assert lengths.tolist() == [3, 3]


def test_an_embedding_far_apart():
    """Offsets past 2^31 elements; see test_kernel_offsets.py."""
    tokens, embedding, *rest = given(vocabulary=3, dtype=torch.float16)
    assert_same(begun(TRITON, tokens, far(embedding, 0), *rest), begun(TRITON, tokens, embedding, *rest))


def test_no_rows_and_no_tokens():
    for batch, new in ((0, 1), (2, 0)):
        tokens, embedding, lengths, *tables = given(batch or 1, new or 1)
        same_inputs(tokens[:batch, :new], embedding, lengths[:batch], *tables)


# next_token


def state_of(batch, slots=4, finished=(), slot=2):
    """Buffers whose every number shows whether it was written."""
    ended = torch.zeros(batch, dtype=torch.bool, device=DEVICE)
    ended[list(finished)] = True
    full = [torch.full(size, 999, device=DEVICE) for size in ((batch, 1), (slots, batch))]
    return TokenState(full[0], ended, full[1], torch.full((batch,), slot, device=DEVICE))


def copied(state):
    return TokenState(*(buffer.clone() for buffer in state))


def same_state(scores, ids, state, ends):
    """The state after the kernel, which is that after the formula."""
    ours, expected = copied(state), copied(state)
    TRITON.next_token(scores, ids, ours, ends, PAD)
    TORCH.next_token(scores, ids, expected, ends, PAD)
    assert_same(ours, expected)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("candidates", [1, 7, 512, 8192, 8193, 20000])
@pytest.mark.parametrize("numbered", [False, True])
def test_the_highest_score_wins(candidates, numbered, dtype):
    scores = draw(5, candidates, dtype=dtype)
    ids = torch.arange(candidates, device=DEVICE).mul(3).add(1).expand(5, -1).int() if numbered else None
    state = same_state(scores, ids, state_of(5, finished=[3]), integers(1, 4))
    best = scores.argmax(1)
    best = best * 3 + 1 if numbered else best
    fed, best[3] = best.clone(), PAD
    fed[3] = 0
    assert_same([state.tokens[:, 0], state.output[2]], [fed, best])
    assert (state.output[[0, 1, 3]] == 999).all() and (state.slot == 3).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_scores_the_first_wins(dtype):
    scores = torch.zeros(3, 20000, dtype=dtype, device=DEVICE)
    scores[1, :8193] = -1
    scores[2, 19990:] = 0.5
    state = same_state(scores, None, state_of(3), integers(7))
    assert state.tokens[:, 0].tolist() == [0, 8193, 19990]


@pytest.mark.parametrize("ends", [(), (5,), tuple(range(2, 90, 2))])
def test_a_row_is_finished_by_an_end_token_and_stays_so(ends):
    ids = integers(4, 5, 1, 88, 0, 5)[:, None]
    state = same_state(None, ids, state_of(6, finished=[5]), integers(*ends).long())
    assert state.finished.tolist() == [token in ends for token in (4, 5, 1, 88, 0)] + [True]
    assert state.tokens[:, 0].tolist() == [4, 5, 1, 88, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value, finite", [(NAN, False), (INF, False), (-INF, True), (-1e4, True)])
def test_a_row_that_is_not_finite_is_marked_in_the_output_only(value, finite, dtype):
    scores = draw(4, 600, dtype=dtype)
    scores[1, 555] = value
    scores[2] = -INF
    scores[3, 20] = value
    state = same_state(scores, None, state_of(4, finished=[3]), integers(0))
    best = scores[[0, 1]].argmax(1).tolist()
    assert state.output[2].tolist() == [best[0], best[1] if finite else NOT_FINITE, NOT_FINITE, PAD]
    assert state.tokens[:, 0].tolist() == [best[0], best[1] if finite else 0, 0, 0]
    assert state.finished.tolist() == [False, not finite, True, True]  # 0, which is fed instead, is an end


def test_a_mark_among_chosen_tokens_is_kept():
    state = same_state(None, integers(3, NOT_FINITE)[:, None], state_of(2), integers(9))
    assert state.output[2].tolist() == [3, NOT_FINITE] and state.tokens[:, 0].tolist() == [3, 0]


def test_each_row_has_a_slot_of_its_own_and_one_outside_is_not_written():
    ids, around = integers(10, 11, 12, 13)[:, None], torch.full((5, 4), 999, device=DEVICE)
    state = state_of(4)._replace(output=around[1:4], slot=integers(2, 0, 3, -1))
    next_token(None, ids, state, integers(0), PAD)
    assert around.tolist() == [[999] * 4, [999, 11, 999, 999], [999] * 4, [10, 999, 999, 999], [999] * 4]
    assert state.slot.tolist() == [3, 1, 4, 0] and state.tokens[:, 0].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("layout", [inner, gap, lambda x: x.t().contiguous().t()])
def test_views_of_candidates(layout):
    scores, ids = draw(3, 40), torch.arange(120, device=DEVICE).view(3, 40)
    same_state(layout(scores), layout(ids), state_of(3), integers(8))


def test_a_row_alone_ends_as_in_a_batch():
    scores, state = draw(9, 300), state_of(9, finished=[4])
    batch = same_state(scores, None, state, integers(2))
    for rows in ([0], [8], [4, 1, 7]):
        part = TokenState(state.tokens[rows], state.finished[rows], state.output[:, rows], state.slot[rows])
        alone = same_state(scores[rows], None, part, integers(2))
        found = batch.tokens[rows], batch.finished[rows], batch.output[:, rows], batch.slot[rows]
        assert_same(alone, found)


def test_scores_far_apart():
    scores = draw(3, 60, dtype=torch.float16)
    state = state_of(3)
    assert_same(
        same_state(far(scores, 0), None, state, integers(2)), same_state(scores, None, state, integers(2))
    )


def test_the_gpus_configuration_agrees():
    tensors, scores = given(2, width=97), draw(2, 9000)
    with configured_for("sm_90"):
        same_inputs(*tensors)
        same_state(scores, None, state_of(2), integers(2))


def test_no_rows_end():
    same_state(draw(0, 5), None, state_of(0), integers(2))


def test_candidates_and_ends_are_not_written():
    scores, ids, ends = draw(3, 40), torch.arange(40, device=DEVICE).repeat(3, 1), integers(3)
    before = [x.clone() for x in (scores, ids, ends)]
    next_token(scores, ids, state_of(3), ends, PAD)
    assert_same([scores, ids, ends], before)


# what is refused

TOKENS, TABLE, LENGTHS = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), draw(9, 4), integers(1, 2)
BAD_INPUTS = [
    (dict(tokens=TOKENS[:, 0]), "tokens of shape [B, T], got [2]"),
    (dict(tokens=TOKENS.float()), "tokens of dtype int64 or int32, got torch.float32"),
    (dict(embedding=TABLE[0]), "embedding of shape [V, E], got [4]"),
    (dict(embedding=TABLE.long()), "embedding of a floating-point dtype, got torch.int64"),
    (dict(embedding=TABLE.to("meta")), f"embedding on {PLACE} as tokens, got meta"),
    (dict(lengths=LENGTHS[:1]), "lengths of shape [2], got [1]"),
    (dict(lengths=LENGTHS.float()), "lengths of an integer dtype, got torch.float32"),
    (dict(cos=TABLE[None]), "cos of shape [P, D/2], got [1, 9, 4]"),
    (dict(sin=TABLE.to("meta")), f"sin on {PLACE} as tokens, got meta"),
    (dict(sin=TABLE.half()), "cos and sin of one floating-point dtype, got torch.float16"),
]
STATE = state_of(2)
BAD_ENDS = [
    (dict(scores=None), "scores, ids or both, got neither"),
    (dict(scores=TABLE[0]), "scores of shape [2, P] with P > 0, got [4]"),
    (dict(scores=TABLE), "scores of shape [2, P] with P > 0, got [9, 4]"),
    (dict(scores=TABLE[:2, :0]), "scores of shape [2, P] with P > 0, got [2, 0]"),
    (dict(scores=TABLE[:2].long()), "scores of a floating-point dtype, got torch.int64"),
    (dict(scores=TABLE[:2].to("meta")), f"scores on {PLACE} as state.tokens, got meta"),
    (dict(ids=TOKENS), "ids of shape [2, 4], got [2, 1]"),
    (dict(scores=None, ids=TOKENS.expand(2, 4)), "ids of shape [2, 1], got [2, 4]"),
    (dict(ids=TABLE[:2]), "ids of dtype int64 or int32, got torch.float32"),
    (dict(ids=TABLE[:2].long().to("meta")), f"ids on {PLACE} as state.tokens, got meta"),
    (dict(ends=TOKENS), "ends of shape [N], got [2, 1]"),
    (dict(ends=LENGTHS.int()), "ends of dtype torch.int64, got torch.int32"),
    (dict(state=STATE._replace(tokens=LENGTHS)), "state.tokens of shape [B, 1], got [2]"),
    (dict(state=STATE._replace(finished=LENGTHS)), "state.finished of dtype torch.bool, got torch.int64"),
    (dict(state=STATE._replace(output=LENGTHS)), "state.output of shape [C, 2], got [2]"),
    (dict(state=STATE._replace(slot=LENGTHS[:1])), "state.slot of shape [2], got [1]"),
    (dict(state=STATE._replace(slot=LENGTHS.to("meta"))), f"state.slot on {PLACE} as state.tokens, got meta"),
]


@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
@pytest.mark.parametrize("change, message", BAD_INPUTS, ids=[message for _, message in BAD_INPUTS])
def test_bad_inputs_are_refused(change, message, ops):
    call = dict(tokens=TOKENS, embedding=TABLE, lengths=LENGTHS, cos=TABLE, sin=TABLE) | change
    with pytest.raises(ValueError, match=re.escape(f"decode_inputs: expected {message}")):
        ops.decode_inputs(**call)


@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
@pytest.mark.parametrize("change, message", BAD_ENDS, ids=[message for _, message in BAD_ENDS])
def test_bad_ends_are_refused(change, message, ops):
    call = dict(scores=TABLE[:2], ids=None, state=STATE, ends=LENGTHS, pad=PAD) | change
    with pytest.raises(ValueError, match=re.escape(f"next_token: expected {message}")):
        ops.next_token(**call)


def test_what_only_the_kernels_refuse():
    double = re.escape("float32, float16 or bfloat16 (the torch backend also takes float64), got")
    with pytest.raises(ValueError, match=f"decode_inputs: expected {double}"):
        decode_inputs(TOKENS, TABLE.double(), LENGTHS, TABLE, TABLE)
    with pytest.raises(ValueError, match=f"next_token: expected {double}"):
        next_token(TABLE[:2].double(), None, STATE, LENGTHS, PAD)
    with pytest.raises(ValueError, match="decode_inputs: expected contiguous lengths, which are written"):
        decode_inputs(TOKENS, TABLE, gap(LENGTHS), TABLE, TABLE)
    with pytest.raises(ValueError, match=re.escape("next_token: expected state.slot contiguous, got (2,)")):
        next_token(TABLE[:2], None, STATE._replace(slot=gap(LENGTHS)), LENGTHS, PAD)


def test_torch_compile_sees_one_operation_each():
    torch.library.opcheck(_decode_inputs.op, given())
    torch.library.opcheck(_next_token.op, (draw(3, 9), None, integers(2), *state_of(3), PAD))
