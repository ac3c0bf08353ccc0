"""Bugs to plant in the kernels, each with a test that must then fail; run as a program, it plants them and reports.

    python tests/planted_faults.py PROJECT SCRATCH NAME...      -> one JSON object on stdout: {name: [exit code of pytest, its output]}

Every fault gets a copy of kernels/ and the kernel tests of its own, and a pytest process that is forked from this one, so that torch and
triton are imported once. "control" is the copy without a fault, with all the tests that the faults name.
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
WORKERS = 2


@dataclass(frozen=True)
class Fault:
    """In kernels/`file`, `old` (which stands there `count` times) becomes `new`; `test` must notice.

    test: of the operation's own test file, or FILE::TEST.
    """

    file: str
    name: str
    test: str
    old: str
    new: str
    count: int = 1

    @property
    def test_id(self) -> str:
        return f"tests/test_kernel_{self.test if '::' in self.test else f'{self.file}::{self.test}'}"


norm, rope, attention = partial(Fault, "rms_norm.py"), partial(Fault, "rope.py"), partial(Fault, "attention.py")
decode, swiglu, loss = partial(Fault, "decode_attention.py"), partial(Fault, "swiglu.py"), partial(Fault, "linear_cross_entropy.py")
layer, head = partial(Fault, "decode_layer.py"), partial(Fault, "decode_head.py")

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
    norm("sum not rounded", "test_the_rounded_sum_is_normalised", "residual.to(tl.float32)).to(x.dtype)", "residual.to(tl.float32))"),
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
    rope("wrong sign in the backward pass", "test_gradient_is_the_rotation_back[rope]", "sin = -sin", "sin = sin"),
    rope("gradient of the values lost", "properties.py::test_every_element_is_written[rope_qkv]", "COPY_V=v is not None", "COPY_V=False"),
    rope("positions of the first row for all", "test_positions_of_each_row[rope]", "batch * table_batch_stride", "0 * table_batch_stride"),
    rope(
        "last tokens not rotated",
        "properties.py::test_every_element_is_written[rope]",
        "(triton.cdiv(tokens, config.block_m),)",
        "(max(1, tokens // config.block_m),)",
    ),
    attention("mask off by one", "test_causality[69]", "visible = key <= last_key", "visible = key <= last_key + 1"),
    attention(
        "mask of the key gradients off by one",
        "test_lengths[7-fp32]",
        "last_key = time + keys - queries",
        "last_key = time + keys - queries - 1",
    ),
    attention(
        "no mask where the diagonal crosses a block", "test_lengths[65-fp32]", "start + BLOCK_N > diagonal", "start > diagonal", count=2
    ),
    attention(
        "no mask where a document begins in a block",
        "test_documents[across tile boundaries-fp32]",
        "if start < clear or",
        "if start < 0 or",
        count=2,
    ),
    attention("no mask in dk where the diagonal crosses a block", "test_lengths[65-fp32]", "if start < diagonal or start", "if start"),
    attention(
        "no mask in dk where a document begins in a block",
        "test_documents[across tile boundaries-fp32]",
        " or start + BLOCK_M > clear:",
        ":",
    ),
    attention("maximum of the wrong end", "test_scale_that_is_not_positive", "(-q, -scale) if scale < 0", "(q, -scale) if scale < 0"),
    attention("missing group sum", "test_lengths[7-fp32]", "for member in range(GROUP)", "for member in range(1)"),
    attention("delta omitted in dq", "test_lengths[7-fp32]", "p * (dp - delta[:, None])", "p * dp"),
    attention("delta omitted in dk", "test_lengths[7-fp16]", "p * (dp - delta[None, :])", "p * dp"),
    attention(
        "delta not written everywhere",
        "properties.py::test_every_element_is_written[attention]",
        "tl.store(delta_ptr + statistic, delta, mask=inside)",
        "tl.store(delta_ptr + statistic, delta, mask=inside & (time > 0))",
    ),
    attention(
        "last key block skipped", "test_lengths[65-fp32]", "* BLOCK_M + offset, keys)", "* BLOCK_M + offset, keys - BLOCK_N)", count=2
    ),
    attention(
        "last query block skipped in dk",
        "test_lengths[65-fp32]",
        "for start in range(begin, end, BLOCK_M)",
        "for start in range(begin, end - BLOCK_M, BLOCK_M)",
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
    attention("pivot of a row without keys", "test_fully_masked_document", 'tl.where(new_m == float("-inf"), 0.0, new_m)', "new_m"),
    attention("aligned to the top left", "test_more_keys_than_queries[7-64-fp32]", "offset = keys - queries", "offset = 0", count=2),
    attention("log2(e) left in dk", "test_lengths[7-fp32]", "dk *= SCALE * 0.6931471805599453", "dk *= SCALE"),
    decode("last split lost", "test_lengths[257-fp32]", "for split in range(0, splits)", "for split in range(0, splits - 1)"),
    decode("splits not rescaled", "test_lengths[257-fp32]", "acc = acc * shrink + part * weight", "acc = acc + part * weight"),
    decode(
        "new queries see each other",
        "test_several_new_queries[3-fp32]",
        "last_key = length - queries + time",
        "last_key = length - 1 + 0 * time",
    ),
    decode("keys beyond the length read", "test_what_lies_beyond_the_length_is_not_read", "filled = key < length", "filled = key < keys"),
    layer(
        "residual of the attention missing", "test_any_width[33-17]", "(y.to(tl.float32) + x.to(tl.float32))", "y.to(tl.float32)", count=2
    ),
    layer("sum before the MLP taken for its input", "test_any_width[33-17]", "act, down, total, out,", "act, down, x, out,"),
    layer(
        "new keys and values not written",
        "test_only_the_new_positions_are_written",
        "there = (position >= 0) &",
        "there = (position < 0) &",
    ),
    layer("written one position late", "test_only_the_new_positions_are_written", "- queries + time", "- queries + time + 1"),
    layer("written past the cache", "test_positions_outside_of_the_cache_are_not_written", " & (position < keys)", ""),
    layer("written before the cache", "test_positions_outside_of_the_cache_are_not_written", "(position >= 0) & ", ""),
    layer("keys into the cache of values", "test_lengths[7-fp32]", "target = k_ptr +", "target = v_ptr +"),
    layer("rotated the wrong way", "test_lengths[7-fp32]", "(wide_a * cos - wide_b * sin)", "(wide_a * cos + wide_b * sin)"),
    layer("values rotated", "test_lengths[7-fp32]", "if head < HEADS + KEY_HEADS:  #", "if head >= 0:  #"),
    layer("keys not rotated", "test_lengths[7-fp16]", "if head < HEADS + KEY_HEADS:  #", "if head < HEADS:  #"),
    layer(
        "angles of the first row for all",
        "test_several_rows_and_tokens[2-5-fp32]",
        "batch * table_batch_stride",
        "0 * table_batch_stride",
    ),
    layer("epsilon dropped", "test_size_of_the_stream[0.001]", "/ WIDTH + EPS", "/ WIDTH"),
    layer("norm over the padded width", "test_any_width[33-17]", "tl.sum(x * x, axis=0) / WIDTH", "tl.sum(x * x, axis=0) / x.shape[0]"),
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
    layer("last split of a row lost", "test_lengths[257-fp32]", "(start + step < filled)", "(start + step < filled - 1)"),
    layer(
        "splits past the first loads lost",
        "test_more_splits_than_are_loaded_at_a_time",
        "range(0, filled, AT_ONCE)",
        "range(0, AT_ONCE, AT_ONCE)",
    ),
    layer("splits of a layer not rescaled", "test_lengths[257-fp32]", "acc = acc * shrink[:, None] +", "acc = acc +"),
    layer("length of the first row for all", "test_lengths[7-fp32]", "lengths_ptr + row // queries", "lengths_ptr + 0 * row"),
    layer("gate and up exchanged", "test_lengths[7-fp32]", "gate * tl.sigmoid(gate) * up", "up * tl.sigmoid(up) * gate"),
    layer(
        "next row taken for this one",
        "test_several_rows_and_tokens[5-3-fp32]",
        "_row(act_ptr, 0, k, FFN)",
        "_row(act_ptr, rows - 1, k, FFN)",
    ),
    layer(
        "last row left out", "test_several_rows_and_tokens[2-5-fp32]", "for row in range(0, rows)", "for row in range(0, rows - 1)", count=4
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
    head("logits of the first row for all", "test_rows[rows2-fp32]", "tl.minimum(row + 1, rows - 1)", "0 * row"),
    swiglu("derivative of the sigmoid omitted", "test_models_widths[1536-fp32]", "(sigmoid + silu * (1.0 - sigmoid))", "sigmoid"),
    swiglu("gradients in the wrong halves", "test_models_widths[1536-fp16]", "grads, grads[:, width:]", "grads[:, width:], grads"),
    swiglu(
        "last tile of columns lost",
        "properties.py::test_every_element_is_written[swiglu]",
        "* triton.cdiv(width, block_n)",
        "* max(1, width // block_n)",
    ),
    loss("missing other=", "test_vocabularies[511-fp32]", 'mask=inside, other=float("-inf")', "mask=inside"),
    loss("ignore_index not honoured in the loss", "test_losses[0.0-0.0-mean-fp32]", "tl.where(valid, loss, 0.0)", "loss"),
    loss(
        "ignore_index not honoured in the gradient",
        "test_losses[0.0-0.0-sum-fp16]",
        "tl.where(valid, tl.load(scale_ptr), 0.0)",
        "tl.load(scale_ptr)",
    ),
    loss("mean over all tokens", "test_losses[0.0-0.0-mean-fp16]", "(targets != ignore_index).sum()", "(targets == targets).sum()"),
    loss("gradient of the z-loss omitted", "test_losses[0.01-0.0-mean-fp32]", "(1.0 + 2.0 * Z_LOSS * lse)", "1.0"),
    loss("label smoothing omitted in the gradient", "test_losses[0.0-0.1-sum-fp32]", "factor * SMOOTHING / vocabulary", "0.0"),
    loss("last chunk lost", "test_chunks[34]", "range(0, tokens, CHUNK_TOKENS)", "range(0, tokens - CHUNK_TOKENS + 1, CHUNK_TOKENS)"),
    loss("dW of the first chunk added to what was there", "test_chunks[32]", "beta = 0 if first else 1", "beta = 1"),
    loss("target in no block", "test_vocabularies[511-fp32]", "(target >= start)", "(target > start)"),
    loss("sums of the blocks not rescaled", "test_vocabularies[49152-fp32]", "total * tl.exp2((m - pivot) * LOG2_E)", "total"),
    loss("first block without a gradient", "test_vocabularies[8193-fp32]", "range(0, blocks)", "range(0, blocks - 1)"),
    loss("dW of the last chunk only", "test_chunks[32]", "total.addmm_(", "total.zero_().addmm_("),
    loss(
        "a target out of range read",
        "test_a_target_out_of_range_gives_nan_and_reads_nothing[97]",
        " & (target >= 0) & (target < vocabulary)",
        " & (target >= 0) & (target <= vocabulary)",
    ),
    loss(
        "saved gradient scaled in place",
        "properties.py::test_a_second_backward_pass_gives_the_same[linear_cross_entropy]",
        "dhidden * dloss",
        "dhidden.data.mul_(dloss.item()) * dloss",
    ),
    norm(
        "not rounded before the weight",
        "test_rounds_before_it_scales",
        "(wide * rstd[:, None]).to(x.dtype).to(tl.float32)",
        "(wide * rstd[:, None])",
    ),
]


def plant(project: Path, folder: Path, fault: Fault | None) -> list[str]:
    """A copy of the kernels with the fault and of their tests, in `folder`; returns what pytest is to run there."""
    shutil.copytree(project / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(project / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project / "pyproject.toml", folder)
    if fault is None:
        return sorted({fault.test_id for fault in FAULTS})
    path = folder / "kernels" / fault.file
    text = path.read_text(encoding="utf-8")
    found = text.count(fault.old)
    if found != fault.count:
        raise SystemExit(f"planted fault {fault.name!r}: {fault.old!r} stands in {fault.file} {found} times, expected {fault.count}")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return [fault.test_id]


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
                pytest.main(["-x", "-q", "--no-header", "--disable-warnings", "-p", "no:cacheprovider", f"--rootdir={folder}", *tests])
            )
            sys.stdout.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def main(project: Path, scratch: Path, names: list[str]) -> None:
    # What all children need (torch asks for sympy at the first call), imported once; nothing of this project: each has a copy of its own.
    import pytest  # noqa: F401
    import sympy  # noqa: F401
    import torch
    import triton.language  # noqa: F401

    torch.set_num_threads(1)  # and no thread pool before a fork
    by_name: dict[str, Fault | None] = {CONTROL: None, **{fault.name: fault for fault in FAULTS}}
    jobs = {}
    for index, name in enumerate(names):
        folder = scratch / str(index)
        jobs[name] = (folder, plant(project, folder, by_name[name]))
    with ThreadPoolExecutor(WORKERS) as pool:
        outcomes = pool.map(lambda job: run_pytest(*job), jobs.values())
        print(json.dumps(dict(zip(jobs, outcomes, strict=True))))


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # the tests of the copy are to be imported, not these
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
