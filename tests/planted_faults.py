"""Bugs to plant in the kernels, each with a test that must then fail; run as a program, it plants them and
reports.

    python tests/planted_faults.py PROJECT SCRATCH NAME...      -> one JSON object on stdout: {name: [exit code of pytest, its output]}

Every fault gets a copy of kernels/ and the kernel tests of its own, and a pytest process that is forked from
this one, so that torch and triton are imported once. "control" is the copy without a fault, with all the
tests that the faults name.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

CONTROL = "control"
OWNERSHIP = "test_the_heads_gradient_is_written_where_nobody_else_sees_it"
WORKERS = 2
NOT_PLANTED = 98  # instead of an exit code: the text has changed


@dataclass(frozen=True)
class Fault:
    """In kernels/`file`, `old` (which stands there `count` times) becomes `new`; `test` must notice, and
    `passing` tests must not.

    test, passing: of the operation's own test file, or FILE::TEST.
    """

    file: str
    name: str
    test: str
    old: str
    new: str
    count: int = 1
    passing: tuple[str, ...] = ()

    @property
    def test_ids(self) -> list[str]:
        """For pytest; the first is the one that must notice."""
        return [
            f"tests/test_kernel_{test if '::' in test else f'{self.file}::{test}'}"
            for test in (self.test, *self.passing)
        ]


norm, rope, attention = (
    partial(Fault, "rms_norm.py"),
    partial(Fault, "rope.py"),
    partial(Fault, "attention.py"),
)
decode, swiglu, loss = (
    partial(Fault, "decode_attention.py"),
    partial(Fault, "swiglu.py"),
    partial(Fault, "linear_cross_entropy.py"),
)
layer, head = partial(Fault, "decode_layer.py"), partial(Fault, "decode_head.py")
embedding, products = partial(Fault, "embedding.py"), partial(Fault, "products.py")
mlp = partial(Fault, "mlp.py")
adamw = partial(Fault, "adamw.py")
ONE_STEP = "test_one_step_is_right_to_the_rounding_of_each_operation[1e-08-0.1-{}]"
SKIPPED = "test_a_skipped_step_writes_the_copy_of_what_stayed_and_nothing_else[{}]"


def interpreter(name: str, test: str, old: str, new: str) -> Fault:
    return Fault("../tests/interpreter.py", name, f"interpreter_bf16.py::{test}", old, new)


FAULTS = [
    norm("dw of the last program lost", "test_models_widths[576-fp32]", "part < parts)", "part < parts - 1)"),
    norm(
        "dw of the programs past the 32nd lost",
        "test_more_partial_sums_than_are_added_at_a_time",
        "range(0, parts, PARTS)",
        "range(0, PARTS, PARTS)",
    ),
    norm("dsum not added", "test_models_widths[576-fp32]", "dx += tl.load", "dx += 0.0 * tl.load"),
    norm("mean over the padded width", "test_models_widths[960-fp16]", "/ WIDTH + EPS", "/ BLOCK + EPS"),
    norm("projection on x omitted", "test_models_widths[576-fp16]", "(grad - normed * mean)", "grad"),
    norm(
        "sum not rounded",
        "test_the_rounded_sum_is_normalised",
        "residual.to(tl.float32)).to(x.dtype)",
        "residual.to(tl.float32))",
    ),
    norm(
        "upstream gradient overwritten",
        "properties.py::test_inputs_are_not_written[add_rms_norm]",
        "dx = torch.empty(",
        "dx = dy if dy.is_contiguous() else torch.empty(",
    ),
    norm(
        "offsets in 32 bits",
        "offsets.py::test_inputs_far_apart[rms_norm-0-0]",
        "tl.program_id(0).to(tl.int64) * ROWS",
        "tl.program_id(0) * ROWS",
    ),
    rope(
        "wrong sign in the backward pass",
        "test_gradient_is_the_rotation_back[rope]",
        "sin = -sin",
        "sin = sin",
    ),
    rope(
        "gradient of the values lost",
        "properties.py::test_every_element_is_written[rope_qkv]",
        "COPY_V=v is not None",
        "COPY_V=False",
    ),
    rope(
        "positions of the first row for all",
        "test_positions_of_each_row[rope]",
        "batch * table_batch_stride",
        "0 * table_batch_stride",
    ),
    rope(
        "last tokens not rotated",
        "properties.py::test_every_element_is_written[rope]",
        "(triton.cdiv(tokens, config.block_m),)",
        "(max(1, tokens // config.block_m),)",
    ),
    attention(
        "mask off by one", "test_causality[69]", "visible = key <= last_key", "visible = key <= last_key + 1"
    ),
    attention(
        "mask of the key gradients off by one",
        "test_lengths[7-fp32]",
        "last_key = time + keys - queries",
        "last_key = time + keys - queries - 1",
    ),
    attention(
        "no mask where the diagonal crosses a block",
        "test_lengths[65-fp32]",
        "start + BLOCK_N > diagonal",
        "start > diagonal",
        count=2,
    ),
    attention(
        "no mask where a document begins in a block",
        "test_documents[across tile boundaries-fp32]",
        "if start < clear or",
        "if start < 0 or",
        count=2,
    ),
    attention(
        "no mask in dk where the diagonal crosses a block",
        "test_lengths[65-fp32]",
        "if start < diagonal or start",
        "if start",
    ),
    attention(
        "no mask in dk where a document begins in a block",
        "test_documents[across tile boundaries-fp32]",
        " or start + BLOCK_M > clear:",
        ":",
    ),
    attention(
        "maximum of the wrong end",
        "test_scale_that_is_not_positive",
        "(-q, -scale) if scale < 0",
        "(q, -scale) if scale < 0",
    ),
    attention("missing group sum", "test_lengths[7-fp32]", "range(0, GROUP * tl.cdiv(", "range(0, tl.cdiv("),
    attention(
        "head not changed where its last block is full",
        "test_lengths[64-fp32]",
        "member += (start >= end)",
        "member += (start > end)",
    ),
    attention(
        "last query block of each head skipped in dk",
        "test_lengths[65-fp32]",
        "end = queries\n",
        "end = queries - BLOCK_M\n",
    ),
    attention(
        "next head begun at the first query",
        "test_lengths[65-fp16]",
        "tl.where(start >= end, begin, start)",
        "tl.where(start >= end, 0, start)",
    ),
    attention(
        "lse and delta of the first head for all",
        "test_lengths[7-fp16]",
        "(head * queries + row)",
        "(0 * head + row)",
    ),
    attention(
        "upstream gradient of the first head for all",
        "test_lengths[7-fp32]",
        "head * HEAD_DIM + lane",
        "0 * head + lane",
    ),
    attention(
        "documents of the first row for all in dk",
        "test_any_first_key[fp32]",
        "doc_row = doc_ptr + batch * doc_batch_stride",
        "doc_row = doc_ptr",
    ),
    attention(
        "documents of the first queries for all in dk",
        "test_documents[short ones-fp32]",
        "doc_row + time[:, None]",
        "doc_row + (time - start)[:, None]",
    ),
    attention(
        "last key not read", "test_lengths[65-fp16]", "tl.minimum(key, keys - 1)", "tl.minimum(key, keys - 2)"
    ),
    attention(
        "offsets of the attention in 32 bits",
        "offsets.py::test_inputs_far_apart[attention-1-1]",
        ">= 2**31",
        ">= 2**63",
    ),
    attention(
        "offsets of a group's heads in 32 bits",
        "test_heads_of_a_group_far_apart[0]",
        "row, head = time.to(tl.int64), tl.cast(member, tl.int64)",
        "row, head = time.to(tl.int64), member",
    ),
    attention(
        "scores of dk rounded otherwise",
        "test_scale[1.0]",
        "tl.dot(k, tl.trans(q), input",
        "tl.dot(k * 1.0000002, tl.trans(q), input",
    ),
    attention("delta omitted in dq", "test_lengths[7-fp32]", "p * (dp - delta[:, None])", "p * dp"),
    attention("delta omitted in dk", "test_lengths[7-fp16]", "p * (dp - delta[None, :])", "p * dp"),
    attention(
        "delta not written everywhere",
        "properties.py::test_every_element_is_written[attention]",
        "tl.join(lse, delta), mask=inside[:, None])",
        "tl.join(lse, delta), mask=(inside & (time > 0))[:, None])",
    ),
    attention(
        "last key block skipped",
        "test_lengths[65-fp32]",
        "* BLOCK_M + offset, keys)",
        "* BLOCK_M + offset, keys - BLOCK_N)",
        count=2,
    ),
    attention(
        "last query block of the last head skipped in dk",
        "test_lengths[65-fp32]",
        "tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)):",
        "tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M) - 1):",
    ),
    attention(
        "document bound off by one",
        "test_documents[short ones-fp32]",
        "visible &= key >= first_key",
        "visible &= key > first_key",
    ),
    attention(
        "document boundary ignored in dk",
        "test_documents_are_isolated[across tile boundaries-10]",
        "doc[None, :], last_key[None, :], HAS_DOCS",
        "doc[None, :], last_key[None, :], False",
        count=2,
    ),
    attention(
        "a visible block of a document skipped",
        "test_documents[across tile boundaries-fp16]",
        "0) // BLOCK_N * BLOCK_N",
        "0) // BLOCK_N * BLOCK_N + BLOCK_N",
        count=2,
    ),
    attention(
        "pivot of a row without keys",
        "test_fully_masked_document",
        'tl.where(new_m == float("-inf"), 0.0, new_m)',
        "new_m",
    ),
    attention(
        "aligned to the top left",
        "test_more_keys_than_queries[7-64-fp32]",
        "offset = keys - queries",
        "offset = 0",
        count=2,
    ),
    attention(
        "log2(e) left in dk", "test_lengths[7-fp32]", "dk *= SCALE * 0.6931471805599453", "dk *= SCALE"
    ),
    decode(
        "last split lost",
        "test_lengths[257-fp32]",
        "for split in range(0, splits)",
        "for split in range(0, splits - 1)",
    ),
    decode(
        "splits not rescaled",
        "test_lengths[257-fp32]",
        "acc = acc * shrink + part * weight",
        "acc = acc + part * weight",
    ),
    decode(
        "new queries see each other",
        "test_several_new_queries[3-fp32]",
        "last_key = length - queries + time",
        "last_key = length - 1 + 0 * time",
    ),
    decode(
        "keys beyond the length read",
        "test_what_lies_beyond_the_length_is_not_read",
        "filled = key < length",
        "filled = key < keys",
    ),
    layer(
        "residual of the attention missing",
        "test_any_width[33-17]",
        "(y.to(tl.float32) + x.to(tl.float32))",
        "y.to(tl.float32)",
        count=2,
    ),
    layer(
        "sum before the MLP taken for its input",
        "test_any_width[33-17]",
        "act, down, total, out,",
        "act, down, x, out,",
    ),
    layer(
        "new keys and values not written",
        "test_only_the_new_positions_are_written",
        "there = (position >= 0) &",
        "there = (position < 0) &",
    ),
    layer(
        "written one position late",
        "test_only_the_new_positions_are_written",
        "- queries + time",
        "- queries + time + 1",
    ),
    layer(
        "written past the cache",
        "test_positions_outside_of_the_cache_are_not_written",
        " & (position < keys)",
        "",
    ),
    layer(
        "written before the cache",
        "test_positions_outside_of_the_cache_are_not_written",
        "(position >= 0) & ",
        "",
    ),
    layer("keys into the cache of values", "test_lengths[7-fp32]", "target = k_ptr +", "target = v_ptr +"),
    layer(
        "rotated the wrong way",
        "test_lengths[7-fp32]",
        "(wide_a * cos - wide_b * sin)",
        "(wide_a * cos + wide_b * sin)",
    ),
    layer("values rotated", "test_lengths[7-fp32]", "if head < HEADS + KEY_HEADS:  #", "if head >= 0:  #"),
    layer(
        "keys not rotated", "test_lengths[7-fp16]", "if head < HEADS + KEY_HEADS:  #", "if head < HEADS:  #"
    ),
    layer(
        "angles of the first row for all",
        "test_several_rows_and_tokens[2-5-fp32]",
        "batch * table_batch_stride",
        "0 * table_batch_stride",
    ),
    layer("epsilon dropped", "test_size_of_the_stream[0.001]", "/ WIDTH + EPS", "/ WIDTH"),
    layer(
        "norm over the padded width",
        "test_any_width[33-17]",
        "tl.sum(x * x, axis=0) / WIDTH",
        "tl.sum(x * x, axis=0) / x.shape[0]",
    ),
    layer(
        "scale of the first norm omitted",
        "test_lengths[7-fp32]",
        "first.to(tl.float32) * scale.to(tl.float32)[None, :]",
        "first.to(tl.float32)",
    ),
    layer(
        "scale of the second norm omitted",
        "test_lengths[7-fp32]",
        "up_rows.to(tl.float32) * scale.to(tl.float32)[None, :]",
        "up_rows.to(tl.float32)",
    ),
    layer(
        "last split of a row lost",
        "test_lengths[257-fp32]",
        "(start + step < filled)",
        "(start + step < filled - 1)",
    ),
    layer(
        "splits past the first loads lost",
        "test_more_splits_than_are_loaded_at_a_time",
        "range(0, filled, AT_ONCE)",
        "range(0, AT_ONCE, AT_ONCE)",
    ),
    layer(
        "splits of a layer not rescaled",
        "test_lengths[257-fp32]",
        "acc = acc * shrink[:, None] +",
        "acc = acc +",
    ),
    layer(
        "length of the first row for all",
        "test_lengths[7-fp32]",
        "lengths_ptr + row // queries",
        "lengths_ptr + 0 * row",
    ),
    layer(
        "gate and up exchanged",
        "test_lengths[7-fp32]",
        "gate * tl.sigmoid(gate) * up",
        "up * tl.sigmoid(up) * gate",
    ),
    layer(
        "next row taken for this one",
        "test_several_rows_and_tokens[5-3-fp32]",
        "_row(act_ptr, 0, k, FFN)",
        "_row(act_ptr, rows - 1, k, FFN)",
    ),
    layer(
        "last row left out",
        "test_several_rows_and_tokens[2-5-fp32]",
        "for row in range(0, rows)",
        "for row in range(0, rows - 1)",
        count=4,
    ),
    layer(
        "offsets into the keys in 32 bits",
        "test_caches_far_apart[key_cache-0]",
        "tl.cast(row // queries, tl.int64)",
        "tl.cast(row // queries, tl.int32)",
    ),
    Fault(
        "backend.py",
        "replacement without effect in the fused layer",
        "decode_layer.py::test_a_replaced_operation_has_its_effect[swiglu]",
        " and not ops.replaced & LAYER_OPS",
        "",
    ),
    head("epsilon dropped in the last norm", "test_size_of_the_stream[0.001]", "/ WIDTH + EPS", "/ WIDTH"),
    head("scale of the last norm omitted", "test_rows[rows2-fp32]", " * scale.to(tl.float32)[None, :]", ""),
    head(
        "last logits lost",
        "test_any_width_and_vocabulary[64-17]",
        "triton.cdiv(vocabulary, config.block_n)",
        "max(1, vocabulary // config.block_n)",
    ),
    head(
        "logits rounded to the model",
        "test_logits_are_not_rounded_to_the_model",
        "tl.store(logits_ptr",
        "logits = logits.to(x.dtype)\n        tl.store(logits_ptr",
    ),
    head(
        "logits of the first row for all", "test_rows[rows2-fp32]", "tl.minimum(row + 1, rows - 1)", "0 * row"
    ),
    swiglu(
        "derivative of the sigmoid omitted",
        "test_models_widths[1536-fp32]",
        "(sigmoid + silu * (1.0 - sigmoid))",
        "sigmoid",
    ),
    swiglu(
        "gradients in the wrong halves",
        "test_models_widths[1536-fp16]",
        "grads, grads[:, width:]",
        "grads[:, width:], grads",
    ),
    swiglu(
        "last tile of columns lost",
        "properties.py::test_every_element_is_written[swiglu]",
        "* triton.cdiv(width, block_n)",
        "* max(1, width // block_n)",
    ),
    mlp(
        "act of what was not rounded",
        "test_act_is_formed_from_the_rounded_gate_and_up[fused-fp16]",
        "wide = rounded_gate.to(tl.float32)",
        "wide = gate_sum",
    ),
    mlp(
        "up taken from gate",
        "test_models_widths[fused-576-1536-fp32]",
        "index // M * HALF + m",
        "0 * HALF + m",
    ),
    mlp(
        "halves of the product exchanged",
        "test_models_widths[fused, descriptors-576-1536-fp32]",
        "gate_sum, up_sum =",
        "up_sum, gate_sum =",
    ),
    mlp(
        "derivative of the sigmoid omitted in the product",
        "test_models_widths[fused-576-1536-fp16]",
        "(sigmoid + silu * (1.0 - sigmoid))",
        "sigmoid",
    ),
    mlp(
        "last tiles lost",
        "test_numbers_of_rows[fused-7-fp32]",
        "tl.cdiv(rows, BLOCK_M) * tl.cdiv(FFN, BLOCK_N)",
        "tl.cdiv(rows, BLOCK_M) * max(1, FFN // BLOCK_N)",
        count=2,
    ),
    mlp(
        "last band as high as all",
        "test_more_tiles_of_rows_than_go_together[fused]",
        "BLOCK_M) - first, GROUP)",
        "BLOCK_M), GROUP)",
    ),
    mlp(
        "last term of a sum lost",
        "test_numbers_of_rows[fused-7-fp16]",
        "(m < HALF) & (n < COLUMNS)",
        "(m < HALF) & (n < COLUMNS - 1)",
    ),
    mlp(
        "rows of a product in 32 bits",
        "test_offsets_past_32_bits[input]",
        "return m.to(tl.int64), n,",
        "return m, n,",
    ),
    mlp(
        "copies ignored",
        "test_fp32_masters[fused-fp16]",
        "to(x.dtype) if copy is None else copy",
        "to(x.dtype)",
    ),
    Fault(
        "backend.py",
        "replacement of swiglu without effect in the fused mlp",
        "mlp.py::test_a_replaced_swiglu_is_composed",
        'if "swiglu" in replacements and',
        'if "rope" in replacements and',
    ),
    loss("missing other=", "test_vocabularies[511-fp32]", 'mask=inside, other=float("-inf")', "mask=inside"),
    loss(
        "ignore_index not honoured in the loss",
        "test_losses[0.0-0.0-mean-fp32]",
        "tl.where(valid, loss, 0.0)",
        "loss",
    ),
    loss(
        "ignore_index not honoured in the gradient",
        "test_losses[0.0-0.0-sum-fp16]",
        "tl.where(valid, tl.load(scale_ptr), 0.0)",
        "tl.load(scale_ptr)",
    ),
    loss(
        "mean over all tokens",
        "test_losses[0.0-0.0-mean-fp16]",
        "(targets != ignore_index).sum()",
        "(targets == targets).sum()",
    ),
    loss(
        "gradient of the z-loss omitted",
        "test_losses[0.01-0.0-mean-fp32]",
        "(1.0 + 2.0 * Z_LOSS * lse)",
        "1.0",
    ),
    loss(
        "label smoothing omitted in the gradient",
        "test_losses[0.0-0.1-sum-fp32]",
        "factor * SMOOTHING / vocabulary",
        "0.0",
    ),
    loss(
        "last chunk lost",
        "test_chunks[34-fp32]",
        "range(0, tokens, chunk)",
        "range(0, tokens - chunk + 1, chunk)",
    ),
    products(
        "dW of the first chunk added to what was there",
        "linear_cross_entropy.py::test_chunks[32-fp32]",
        "beta = 0 if first else 1",
        "beta = 1",
    ),
    products(
        "dW of the last chunk only",
        "linear_cross_entropy.py::test_chunks[32-fp32]",
        "total.addmm_(",
        "total.zero_().addmm_(",
    ),
    products(
        "a wave that is not full",
        "linear_cross_entropy.py::test_the_chunks_of_the_models",
        "waves * processors // across",
        "-(-waves * processors // across)",
    ),
    loss("target in no block", "test_vocabularies[511-fp32]", "(target >= start)", "(target > start)"),
    loss(
        "sums of the blocks not rescaled",
        "test_vocabularies[49152-fp32]",
        "total * tl.exp2((m - pivot) * LOG2_E)",
        "total",
    ),
    loss(
        "first block without a gradient",
        "test_vocabularies[8193-fp32]",
        "tl.range(0, blocks,",
        "tl.range(0, blocks - 1,",
    ),
    loss(
        "a target out of range read",
        "test_a_target_out_of_range_gives_nan_and_reads_nothing[97]",
        " & (target >= 0) & (target < vocabulary)",
        " & (target >= 0) & (target <= vocabulary)",
    ),
    loss(
        "gradients given away twice",
        "properties.py::test_a_second_backward_pass_gives_the_same[linear_cross_entropy]",
        "gradients, ctx.gradients = ctx.gradients, None",
        "gradients = ctx.gradients",
    ),
    loss(
        "upstream gradient left out",
        "test_numbers_of_tokens[65-fp32]",
        "if upstream != 1.0",
        "if upstream != upstream",
    ),
    loss(
        "end of the gradients not rescaled",
        "test_rescaling[fp32]",
        "range(first, weight_size, step)",
        "range(first, step, step)",
    ),
    loss(
        "upstream gradient of 1 multiplied",
        "test_the_gradients_are_given_away",
        "if upstream != 1.0",
        "if upstream == upstream",
    ),
    loss("scale left out of the mean", "test_scale[mean-fp32]", "factor = factor / (", "factor = 1.0 / ("),
    loss(
        "scale left out of the gradients",
        "test_scale[sum-fp32]",
        "targets[start:], factor,",
        "targets[start:], torch.ones_like(factor),",
    ),
    loss(
        "copy of the weight not used",
        "test_a_copy_of_the_weight_gives_the_same_bits[fp16]",
        "if weight_copy is None else weight_copy",
        "",
    ),
    embedding(
        "rows of a piece past the first ones lost",
        "test_runs_of_equal_ids[(127,)]",
        "position += ROWS",
        "position += stop",
    ),
    embedding(
        "end of a window passed",
        "test_runs_of_equal_ids[(129,)]",
        "first, stop, row, dx_stride, WIDTH, ROWS",
        "first, tokens, row, dx_stride, WIDTH, ROWS",
        count=2,
    ),
    embedding(
        "pieces in the other windows lost",
        "test_runs_of_equal_ids[(256,)]",
        "more = (stop < tokens)",
        "more = (stop < 0)",
    ),
    embedding(
        "windows past the first ones lost",
        "test_runs_of_equal_ids[(1283,)]",
        "window += ROWS",
        "window += tokens",
    ),
    embedding(
        "window that begins with a run taken for its rest",
        "test_runs_of_equal_ids[(100, 384, 1, 100)]",
        "& (tl.load(ids_ptr + start, mask=start < tokens, other=-1) == row)",
        "",
        count=2,
    ),
    embedding(
        "gradient of the head overwritten",
        "test_models_widths[576-fp32]",
        "total += tl.load(target, mask=column < WIDTH, other=0.0).to(tl.float32)",
        "total += 0.0",
    ),
    embedding(
        "last columns lost",
        "test_other_columns_than_a_program_has",
        "columns = triton.cdiv(width, block)",
        "columns = width // block",
    ),
    embedding(
        "tokens of another order",
        "test_numbers_of_tokens[65-fp32]",
        "dx_ptr + token[:, None]",
        "dx_ptr + positions[:, None]",
    ),
    embedding(
        "id out of range not noticed",
        "test_an_id_out_of_range_raises[23]",
        "tl.store(known_ptr, 0)",
        "tl.store(known_ptr, 1)",
    ),
    embedding(
        "written past the last row",
        "test_nothing_is_written_out_of_bounds[23]",
        "(row < vocabulary):",
        "(row <= vocabulary):",
    ),
    embedding(
        "written before the first row", "test_nothing_is_written_out_of_bounds[-1]", "& (row >= 0) &", "&"
    ),
    embedding(
        "gradient that a hook keeps written",
        f"{OWNERSHIP}[hook_that_keeps]",
        "sys.getrefcount(gradient) - sys.getrefcount(fresh) >= held",
        "False",
    ),
    embedding("gradient that was asked for written", f"{OWNERSHIP}[asked_for]", "held > HELD or ", ""),
    embedding(
        "gradient that an alias shows written",
        f"{OWNERSHIP}[hook_that_keeps_an_alias]",
        "torch._C._storage_Use_Count(storage._cdata) == 2 and ",
        "",
    ),
    embedding(
        "gradient of the head copied always",
        f"{OWNERSHIP}[backward]",
        "dhead if _is_ours(dhead, fresh) else ",
        "",
    ),
    norm(
        "not rounded before the weight",
        "test_rounds_before_it_scales",
        "(wide * rstd[:, None]).to(x.dtype).to(tl.float32)",
        "(wide * rstd[:, None])",
    ),
    # What no test of another dtype than bf16 notices.
    decode(
        "keys counted in the dtype",
        "test_lengths[257-bf16]",
        "filled = key < length",
        "filled = key.to(tl.float32).to(q.dtype) < length.to(tl.float32).to(q.dtype)",
        passing=("test_lengths[257-fp16]", "test_lengths[257-fp32]"),
    ),
    decode(
        "16-bit probabilities in fp16",
        "properties.py::test_bf16_range[decode_attention]",
        "acc = tl.dot(p.to(v.dtype), v, ",
        "half = v.dtype if v.dtype == tl.float32 else tl.float16\n        acc = tl.dot(p.to(half), v.to(half), ",
        passing=("test_lengths[257-fp16]", "test_lengths[257-fp32]"),
    ),
    decode(
        "splits added up in the dtype",
        "properties.py::test_small_values_after_a_large_one[decode_attention-bf16]",
        "acc * shrink + part * weight",
        "(acc * shrink + part * weight).to(out_ptr.dtype.element_ty).to(tl.float32)",
        passing=("properties.py::test_small_values_after_a_large_one[decode_attention-fp16]",),
    ),
    attention(
        "blocks added up in the dtype",
        "properties.py::test_small_values_after_a_large_one[attention-bf16]",
        "acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None]",
        "acc = tl.dot(p.to(v.dtype), v, acc.to(v.dtype).to(tl.float32) * shrink[:, None]",
        passing=("properties.py::test_small_values_after_a_large_one[attention-fp16]",),
    ),
    layer(
        "position counted in the dtype",
        "test_lengths[257-bf16]",
        "tl.load(lengths_ptr + batch).to(tl.int64) - queries",
        "tl.load(lengths_ptr + batch).to(tl.float32).to(x.dtype).to(tl.int64) - queries",
        passing=("test_lengths[257-fp16]", "test_lengths[257-fp32]"),
    ),
    swiglu(
        "16-bit gradients through fp16",
        "properties.py::test_bf16_range[swiglu]",
        "tl.store(dup_ptr + grad, (dy * silu).to(gate.dtype)",
        "tl.store(dup_ptr + grad, (dy * silu).to(gate.dtype if gate.dtype == tl.float32 else tl.float16)",
        passing=("test_models_widths[1536-fp16]", "test_models_widths[1536-fp32]"),
    ),
    # And what bf16 notices, too.
    norm(
        "gradient of the weight added up in the dtype",
        "test_numbers_of_rows[257-bf16]",
        "dw += dy * normed.to(x.dtype).to(tl.float32)",
        "dw = (dw + dy * normed.to(x.dtype).to(tl.float32)).to(x.dtype).to(tl.float32)",
    ),
    norm(
        "not rounded before the weight, in bf16",
        "properties.py::test_rounds_where_the_reference_does[rms_norm-bf16]",
        "(wide * rstd[:, None]).to(x.dtype).to(tl.float32)",
        "(wide * rstd[:, None])",
    ),
    layer(
        "sum added in bf16",
        "test_any_width[33-17]",
        "(y.to(tl.float32) + x.to(tl.float32))",
        "(y.to(tl.bfloat16) + x.to(tl.bfloat16))",
        count=2,
    ),
    rope(
        "rotation added up in the dtype",
        "properties.py::test_rounds_where_the_reference_does[rope-bf16]",
        "first, second = a.to(tl.float32), b.to(tl.float32)",
        "first, second, cos, sin = a, b, cos.to(a.dtype), sin.to(a.dtype)",
    ),
    adamw(
        "the masked rest left out",
        "test_sizes_with_every_kind_of_tail[0.0]",
        "range(wide, end, TAIL)",
        "range(wide, wide, TAIL)",
        2,
    ),
    adamw(
        "second moment not corrected",
        "test_sizes_with_every_kind_of_tail[0.0]",
        "1.0 / tl.sqrt(correction2)",
        "0.0 * correction2 + 1.0",
    ),
    adamw("no weight decay", "test_sizes_with_every_kind_of_tail[0.0]", "p -= decay * p", "p -= 0.0 * p"),
    adamw(
        "decay of the updated weight",
        ONE_STEP.format("betas0"),
        "tl.sqrt_rn(v) * root + eps)",
        "tl.sqrt_rn(v) * root + eps) * (1.0 - decay)",
    ),
    adamw("averages cancel", ONE_STEP.format("betas2"), "tl.where(weight < 0.5,", "tl.where(weight < 2.0,"),
    adamw(
        "clipping left out", "test_sizes_with_every_kind_of_tail[1.0]", "other=0.0) * factor", "other=0.0)"
    ),
    adamw(
        "skipped step taken",
        SKIPPED.format("fp16-inf"),
        "(g != 0) & (tl.load(found_inf_ptr) == 0.0)",
        "g != 0",
    ),
    adamw(
        "skipped step counted",
        SKIPPED.format("fp16-inf"),
        "if tl.load(found_inf_ptr) == 0.0:",
        "if tl.load(found_inf_ptr) >= 0.0:",
    ),
    adamw("no copy when a step is skipped", SKIPPED.format("bf16-nan"), "if copied:", "if copied & update:"),
    adamw(
        "chunks of a norm overlap",
        "test_norm_and_factor[1.0-1.0]",
        "tl.minimum(begin + CHUNK, tl.load(sizes_ptr + tensor))",
        "tl.load(sizes_ptr + tensor)",
    ),
    adamw(
        "captured table shared with eager steps",
        "test_a_capture_has_a_table_and_a_source_that_nothing_else_writes",
        "pinned, table = self._spare",
        "pinned, table = self._spare[0], self._table",
    ),
    # Of the corrected interpreter.
    interpreter(
        "bf16 truncated",
        "test_rounding[32769]",
        "rounded = kept + ((bits & 0xFFFF) + (kept & 1) > 0x8000)",
        "rounded = kept",
    ),
    interpreter("ties away from zero", "test_rounding[32768]", "(kept & 1) > 0x8000", "1 > 0x8000"),
    interpreter(
        "NaN of the upper half lost",
        "test_rounding[1]",
        "np.where(np.isnan(values), 0x7FC0, rounded)",
        "rounded",
    ),
    interpreter(
        "patterns multiplied", "test_dot_is_exact_where_fp32_is", '"scatter", ', '"scatter", "dot", '
    ),
    interpreter(
        "patterns added",
        "test_sums_round_after_every_step",
        "if any(is_bf16(y.dtype) for y in inputs)",
        "if not inputs",
    ),
]


def plant(project: Path, folder: Path, fault: Fault | None) -> list[str]:
    """A copy of the kernels with the fault and of their tests, in `folder`; returns what pytest is to run
    there.
    """
    shutil.copytree(project / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(project / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project / "pyproject.toml", folder)
    if fault is None:
        return sorted({test for fault in FAULTS for test in fault.test_ids})
    path = folder / "kernels" / fault.file
    text = path.read_text(encoding="utf-8")
    found = text.count(fault.old)
    if found != fault.count:
        raise ValueError(f"{fault.old!r} stands in {fault.file} {found} times, expected {fault.count}")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return fault.test_ids


def run_pytest(folder: Path, tests: list[str]) -> tuple[int, str]:
    """(exit code, output) of pytest in a child of this process; a negative code is the signal that ended it."""
    log = folder / "log"
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        code = 99
        try:
            import pytest

            code = int(
                pytest.main(
                    [
                        "-q",
                        "--no-header",
                        "--disable-warnings",
                        "-p",
                        "no:cacheprovider",
                        f"--rootdir={folder}",
                        *tests,
                    ]
                )
            )
            sys.stdout.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def main(project: Path, scratch: Path, names: list[str]) -> None:
    # What all children need (torch asks for sympy at the first call), imported once; nothing of this project:
    # each has a copy of its own.
    import pytest  # noqa: F401
    import sympy  # noqa: F401
    import torch
    import triton.language  # noqa: F401

    torch.set_num_threads(1)  # and no thread pool before a fork
    by_name: dict[str, Fault | None] = {CONTROL: None, **{fault.name: fault for fault in FAULTS}}

    def outcome(job: tuple[int, str]) -> tuple[int, str]:
        folder = scratch / str(job[0])
        try:
            tests = plant(project, folder, by_name[job[1]])
        except ValueError as error:
            return NOT_PLANTED, str(error)
        return run_pytest(folder, tests)

    with ThreadPoolExecutor(WORKERS) as pool:
        print(json.dumps(dict(zip(names, pool.map(outcome, enumerate(names)), strict=True))))


if __name__ == "__main__":
    # the tests of the copy are to be imported, not these
    sys.path.remove(str(Path(__file__).resolve().parent))
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
