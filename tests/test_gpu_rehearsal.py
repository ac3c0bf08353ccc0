"""A run on a GPU, rehearsed without one: the parts of bench.gpu and a captured training run on a stand-in,
and their kernels compiled.

What is computed is what memory happened to hold, so no number counts here. That nothing fails does: each part
takes the way that it takes on a GPU, and a row may only fail for want of what is really not there. `python -m
bench.gpu --device cpu --tiny`, the other half of the rehearsal, is in tests/test_bench_gpu_command.py; what
neither can see stands in bench/gpu.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from kernels.certify.fill import Specialisation, launched_by  # noqa: E402

pytestmark = pytest.mark.slow
PARTS = ("train_step", "kernels", "generation", "ladder", "tuning", "roofline", "memcheck")
OF_TRAINING = {
    "_adamw_kernel", "_attention_bwd_dkv_kernel", "_attention_bwd_dq_kernel", "_attention_fwd_kernel",
    "_embedding_bwd_kernel", "_embedding_bwd_piece_kernel", "_embedding_fwd_kernel", "_norm_kernel",
    "_rescale_kernel", "_rms_norm_bwd_dw_kernel", "_rms_norm_bwd_dx_kernel", "_rms_norm_fwd_kernel",
    "_rope_kernel", "_scalars_kernel", "_softmax_gradient_kernel", "_sum_of_squares_kernel",
    "_swiglu_bwd_kernel", "_swiglu_fwd_kernel",
}  # fmt: skip
OF_DECODING = {
    "_combine_o_kernel", "_decode_attention_combine_kernel", "_decode_attention_split_kernel",
    "_decode_inputs_kernel", "_next_token_kernel", "_norm_gate_up_kernel",
    "_norm_head_kernel", "_norm_qkv_rope_kernel", "_project_kernel", "_rope_cache_kernel",
}  # fmt: skip
KERNELS = OF_TRAINING | OF_DECODING | {"_mlp_fwd_kernel", "_mlp_bwd_kernel", "_decode_layers_kernel"}
# What a stand-in cannot have: numbers, a torch that was built with CUDA, libraries that are not installed.
EXCUSED = re.compile(
    r"wrong: |logits: expected finite numbers|Torch not compiled with CUDA|is not installed|needs a GPU"
    r"|needs Triton kernels|No viable backend for scaled_dot_product_attention"
    r"|Could not run 'aten::_flash_attention_forward'|FlexAttention does not support backward on CPU"
)
# [names of the parts, folder]: every part in one process, each on a GPU of its own.
STAND_IN = """
import importlib, json, sys, traceback
from pathlib import Path
from bench import launches, timing
from bench.stand_in import standing_in_for_cuda
from kernels.certify.fill import Specialisations
from kernels.certify.targets import target_for
timing.FLUSH_BYTES = 1 << 20  # there is no L2 to flush, and a CPU reads a quarter of a gigabyte in no hurry
launches.trace = lambda call: [call()] * 0  # torch's profiler would look for kernels again and again
for name in sys.argv[1].split():
    recorder, path = Specialisations(target_for("sm_90")), Path(sys.argv[2], f"{name}.json")
    try:
        with standing_in_for_cuda(recorder):
            arguments = ["--device", "cuda", "--tiny", "--json", str(path)]
            end = importlib.import_module(f"bench.{name}").main(arguments)
    except BaseException:
        end = traceback.format_exc()
    launched = sorted({kernel for _, kernel, _ in recorder.found})
    path.with_suffix(".end").write_text(json.dumps([end, launched]))
"""
TRAINING = """
import json, sys
from bench.stand_in import standing_in_for_cuda
from kernels.certify.fill import Specialisations
from kernels.certify.targets import target_for
from train.run import main
recorder = Specialisations(target_for("sm_90"))
with standing_in_for_cuda(recorder):
    code = main(sys.argv[1:])
print(json.dumps(sorted({kernel for _, kernel, _ in recorder.found})))
sys.exit(code)
"""


def run(root: Path, *arguments: str) -> str:
    """Python in the project's root, without Triton's interpreter -> what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # what torch.compile makes for a GPU cannot be made here, and for a CPU it takes long
    environment["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def on_stand_in(project_root, tmp_path_factory):
    """The folder of the results of all parts, run as if there were a GPU."""
    folder = tmp_path_factory.mktemp("parts")
    run(project_root, "-c", STAND_IN, " ".join(PARTS), str(folder))
    return folder


def failures(value: Any) -> list[str]:
    """Every "failed" of a JSON file, however deep."""
    if isinstance(value, list):
        return [found for item in value for found in failures(item)]
    if not isinstance(value, dict):
        return []
    own = [str(text) for name, text in value.items() if name.endswith("failed")]
    return own + [found for item in value.values() for found in failures(item)]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_takes_its_way_on_a_gpu(on_stand_in, part):
    end, launched = json.loads((on_stand_in / f"{part}.end").read_text(encoding="utf-8"))
    assert end == 0, end
    content = json.loads((on_stand_in / f"{part}.json").read_text(encoding="utf-8"))
    assert content["device"] == "sm_90", "the part believed that there was a GPU"
    assert [text for text in failures(content) if not EXCUSED.search(text)] == []
    assert launched or part == "ladder", "its small size takes backend torch"


def test_a_captured_training_run(project_root, tmp_path):
    """Eager steps, the capture, replays, evaluation and a checkpoint."""
    out = tmp_path / "run"
    keys = (
        "device=cuda backend=triton cuda_graph=true dtype=bf16 steps=6 eval_every=3 sample_every=0 "
        "checkpoint_every=3 workers=1"
    )
    printed = run(project_root, "-c", TRAINING, "train/configs/tiny.yaml", f"output_dir={out}", *keys.split())
    # for more tokens than a window has
    assert {*json.loads(printed.splitlines()[-1])} == OF_TRAINING - {"_embedding_bwd_piece_kernel"}
    assert (out / "checkpoints" / "step-000006").is_dir()
    assert len((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) >= 6


def test_what_is_launched_is_compiled_and_found(project_root, tmp_path, monkeypatch):
    """What training, generation and the parts of bench.gpu launch at full size; of each kernel, the first in
    bf16 goes through the compiler.
    """
    found: dict[str, Specialisation] = {}
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    for item in (*launched_by("model", "sm_90"), *launched_by("bench", "sm_90")):
        assert item.module.startswith("kernels.")
        # adamw reaches its tensors by their addresses
        if "*bf16" in item.data or item.module == "kernels.adamw":
            found.setdefault(item.kernel, item)
    assert found.keys() == KERNELS
    (tmp_path / "few.json").write_text(json.dumps(list(found.values())), encoding="utf-8")
    script = """
import json, sys
from pathlib import Path
from kernels.certify.fill import Specialisation, fill, verify
from kernels.certify.targets import target_for
if __name__ == "__main__":
    found = [Specialisation(*item) for item in json.loads(Path(sys.argv[1]).read_text())]
    for step in (fill, verify):
        print(json.dumps(step(found, target_for("sm_90"), Path(sys.argv[2]), 2)))
"""
    (tmp_path / "compile_few.py").write_text(
        f"import sys\nsys.path.insert(0, {str(project_root)!r})\n{script}", encoding="utf-8"
    )
    printed = run(
        project_root, str(tmp_path / "compile_few.py"), str(tmp_path / "few.json"), str(tmp_path / "cache")
    )
    assert [json.loads(line) for line in printed.splitlines()] == [
        {"compiled": len(KERNELS) + 1},
        {"there already": len(KERNELS) + 1},
    ]
