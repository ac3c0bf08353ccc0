"""`python -m bench.generate` at toy size, and the pieces that its figures are made of."""

import hashlib
import json
from importlib.util import find_spec

import gguf_files
import pytest
import torch
from in_process import printed

from bench import generate, generate_modes, generate_plan
from bench.generate_plan import Row
from bench.peers import choice, llama_cpp
from bench.peers.status import NotInstalled
from bench.record import TINY_NOTE
from bench.variant import Variant
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM

MODES = ("eager fp32", "eager bf16", "eager int8", "captured fp32")
PEERS = ("transformers fp32", "transformers bf16", "torchao int8")
HERE = PEERS if find_spec("torchao") else PEERS[:2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(stdout, pytest-benchmark's JSON) of a run at toy size."""
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    path = tmp_path_factory.mktemp("generate") / "generate.json"
    stdout = printed(generate.main, "--tiny", "--device", "cpu", "--json", path, "--modes", *MODES)
    return stdout, json.loads(path.read_text(encoding="utf-8"))


def test_every_case_has_a_prefill_and_a_decode_figure_of_every_variant(measured):
    stdout, content = measured
    found = {(entry["group"], entry["extra_info"]["variant"]) for entry in content["benchmarks"]}
    groups = {
        f"{phase}, batch {batch}, prompt {prompt}"
        for phase in ("prefill", "decode")
        for batch in (1, 2)
        for prompt in (4, 9)
    }
    assert found == {(group, name) for group in groups for name in (*MODES, *HERE)}
    assert TINY_NOTE in stdout
    assert all(f"batch {batch}, prompt {prompt}" in stdout for batch in (1, 2) for prompt in (4, 9))


def test_a_figure_carries_what_makes_it_worth_something(measured):
    for entry in measured[1]["benchmarks"]:
        facts = entry["extra_info"]
        wanted = {"device", "versions", "commit", "threads", "wait_policy", "dtype", "output_hash"}
        assert wanted <= facts.keys()
        tokens = facts["batch"] * (facts["prompt_tokens"] if facts["phase"] == "prefill" else 1)
        assert facts["tokens_per_second"] == pytest.approx(tokens / entry["stats"]["median"], rel=1e-3)
        if facts["phase"] == "decode":
            assert facts["bytes_per_token"] > 0 and facts["percent_of_roof"] > 0


def test_in_fp32_all_put_out_the_same_tokens(measured):
    """Transformers included: the hash beside a speed says that it is the speed of the same work."""
    for batch in (1, 2):
        for prompt in (4, 9):
            facts = [
                entry["extra_info"]
                for entry in measured[1]["benchmarks"]
                if entry["group"] == f"decode, batch {batch}, prompt {prompt}"
            ]
            exact = {one["variant"]: one["output_hash"] for one in facts if one["variant"].endswith("fp32")}
            assert len(exact) == 3 and len(set(exact.values())) == 1
            assert all(one["agreement_with_fp32_eager"] == 1.0 for one in facts if one["variant"] in exact)


def test_libraries_that_were_not_measured_are_named_beside_the_figures(measured):
    stdout, content = measured
    found = content["peers"]
    assert set(found) == {*choice.OF_GENERATION} and found["transformers"]["used"]
    for name in ("litgpt", "llama-cpp-python"):
        assert not found[name]["used"] and f"not measured: {name}" in stdout
    assert found["llama-cpp-python"]["why"] == "left out at toy sizes"


def test_our_model_under_torch_compile_and_a_static_cache_put_out_the_same_tokens():
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    plan = generate.Plan(
        device=torch.device("cpu"), modes=("eager fp32", "torch.compile fp32"), peers="none", tiny=True
    )
    plan.names = (*plan.names, "transformers+static fp32")
    for case in plan.cases[1:3]:  # one row and two
        rows = plan.rows(case)
        assert [row.failed for row in rows.values()] == ["", "", ""]
        assert all(row.agreement == 1.0 for row in rows.values())
    assert plan.status()["torch.compile"]["used"]


def test_what_is_not_available_is_a_row_with_its_reason(monkeypatch):
    def absent(*arguments, **options):
        raise NotInstalled("transformers")

    monkeypatch.setattr(choice, "transformers_variant", absent)
    plan = generate.Plan(device=torch.device("cpu"), modes=("eager fp32",), tiny=True)
    rows = plan.rows((1, 4))
    assert list(rows) == ["eager fp32", *PEERS] and not rows["eager fp32"].failed
    assert all(
        rows[name].failed == "not available: transformers is not installed; pip install -e '.[peers]'"
        for name in PEERS
    )
    assert "pip install -e '.[peers]'" in generate.show((1, 4), rows, lambda *_: 1.0)
    assert plan.status()["transformers"]["why"] == "not installed; pip install -e '.[peers]'"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--new-tokens", "1"], "--new-tokens: expected at least 2, got 1"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--modes", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(UsageError, match=message):
        generate.main(arguments)


class Counted:
    """Turns of a fake variant, which note when they ran."""

    def __init__(self, name, log, tokens, fails=False):
        self.name, self.log, self.tokens, self.fails = name, log, tokens, fails

    def prefill(self):
        if self.fails:
            raise RuntimeError("no kernel\nimage")
        self.log.append(self.name)
        return self.tokens[:, :1]

    def decode(self, tokens, steps):
        return self.tokens[:, 1 : 1 + steps]


def fake(name, log, tokens, fails=False):
    return Variant("float32", 1, 1, lambda prompts, new_tokens: Counted(name, log, tokens, fails))


def test_variants_take_turns_after_a_first_call_that_does_not_count():
    log: list[str] = []
    tokens = torch.arange(6).view(1, 6)
    variants = {
        "eager fp32": fake("a", log, tokens),
        "other": fake("b", log, tokens.clone().index_fill_(1, torch.tensor([3]), 9)),
    }
    rows = generate_plan.measure(variants, torch.zeros(1, 2, dtype=torch.int64), 6, 3, lambda: 60.0)
    assert "".join(log) == "aabb" + "abab"  # each once to warm up, then in turns
    assert all(len(row.prefill) == len(row.decode) == 3 for row in rows.values())
    # the tokens after a difference do not count
    assert (rows["eager fp32"].agreement, rows["other"].agreement) == (1.0, 0.5)


def test_no_round_begins_when_no_time_is_left():
    variants, prompts = {"eager fp32": fake("a", [], torch.zeros(1, 4))}, torch.zeros(1, 2).long()
    rows = generate_plan.measure(variants, prompts, 4, 9, lambda: -1.0)
    assert len(rows["eager fp32"].decode) == 1


def test_a_variant_that_raises_is_a_result_among_others():
    log: list[str] = []
    variants = {
        "broken": fake("x", log, torch.zeros(1, 4), fails=True),
        "right": fake("a", log, torch.zeros(1, 4)),
    }
    rows = generate_plan.measure(variants, torch.zeros(1, 2, dtype=torch.int64), 4, 2, lambda: 60.0)
    assert rows["broken"].failed == "RuntimeError: no kernel image" and not rows["right"].failed
    assert rows["right"].agreement is None  # nothing to compare with
    table = generate.show((1, 2), rows, lambda name, seconds: 12.5)
    assert "RuntimeError: no kernel image" in table and "12.5%" in table


def test_comparisons_take_the_best_of_ours_and_say_what_was_not_reached():
    def row(prefill, decode):
        return Row([prefill], [decode])

    rows = {
        "eager bf16": row(1.0, 4.0), "compiled bf16": row(2.0, 1.0), "compiled int8": row(2.0, 1.0),
        "llama.cpp F16": row(1.5, 1.5), "llama.cpp Q8_0": row(1.0, 1.1),
        "transformers bf16": Row(failed="not available"),
    }  # fmt: skip
    found = generate.comparisons((1, 512), rows)
    assert found == [
        "  decode, our best in bf16 over llama.cpp F16: 1.50 x, wanted 1.0 x",
        "  decode, our best in int8 over llama.cpp Q8_0: 1.10 x, wanted 1.2 x: NOT REACHED",
        "  prefill, our best in bf16 over llama.cpp F16: 1.50 x, wanted 1.5 x",
    ]
    assert not any("wanted" in line for line in generate.comparisons((8, 512), rows))


def test_the_hash_is_that_of_the_ids():
    ids = torch.tensor([[1, 2], [3, 258]])
    raw = b"".join(value.to_bytes(8, "little") for value in (1, 2, 3, 258))
    wanted = hashlib.sha256(raw).hexdigest()[:12]
    assert {generate.digest(same) for same in (ids, ids.int(), ids.T.contiguous().T)} == {wanted}


def test_bytes_of_a_step_are_those_of_the_quantised_weights():
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), "torch").bfloat16().eval()
    plain = generate_modes.engine_variant(generate_plan.select_engine(model, compiled=False))
    int8 = generate_modes.engine_variant(generate_plan.select_engine(model, quantize="int8", compiled=False))
    assert plain.weight_bytes == 2 * model.num_parameters()
    assert plain.weight_bytes / 2 < int8.weight_bytes < 0.6 * plain.weight_bytes
    config = model.config
    assert (
        plain.cache_bytes == 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )


def test_llama_cpp_puts_out_the_tokens_of_this_model(tmp_path):
    pytest.importorskip("llama_cpp", reason="the comparison needs llama-cpp-python")
    torch.manual_seed(0)
    model = SmolLM2ForCausalLM(gguf_files.CONFIG, "torch").eval()
    llama_cpp.save_gguf(model, tmp_path / "model.gguf", "f32")
    prompts = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    variant = llama_cpp.llama_cpp_variant(tmp_path / "model.gguf", model.config, "F32", 1)
    ours = generate_modes.EngineTurns(generate_plan.Engine(model), prompts, 8)
    theirs = variant.begin(prompts, 8)
    for _ in range(2):  # the second time from a cache that is not empty
        mine, other = ours.prefill(), theirs.prefill()
        assert torch.equal(mine, other)
        assert torch.equal(ours.decode(mine, 7), theirs.decode(other, 7))
    assert variant.weight_bytes == 4 * model.num_parameters()
