"""What smollm2/pretrained/gguf_writer.py writes is what our reader, llama.cpp and transformers read."""

from __future__ import annotations

import resource

import pytest
import tokenizers
import torch

from smollm2 import SmolLM2ForCausalLM, generate
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.load import stored_tensors
from smollm2.pretrained.tokenizer import Tokenizer, tokenizer_from_gguf, train_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

import gguf_files  # noqa: E402

from smollm2.pretrained import gguf_writer  # noqa: E402
from smollm2.pretrained.gguf import open_gguf  # noqa: E402
from smollm2.pretrained.gguf_writer import save_gguf  # noqa: E402

TEXTS = ["Hello, world! It's 2024.", "def f(x):\n\treturn x ** 2\n", "<|im_start|>user\nHi<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(TEXTS * 9, 290)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model():
    config = gguf_files.CONFIG.replace(bos_token_id=0, eos_token_id=0, pad_token_id=None)
    torch.manual_seed(0)
    return SmolLM2ForCausalLM(config, "torch").eval()


def test_names_and_rows_are_those_of_an_independent_writer(model):
    weights, config = gguf_files.random_weights(), model.config
    known = {hf_name: name for name, hf_name in gguf_writer.tensor_names(2).items()}
    assert known == {name: gguf_files.gguf_name(name) for name in weights}
    rows = gguf_writer._rows(Q, weights[Q], config)
    assert torch.equal(rows, gguf_files.interleave_rows(weights[Q], config.num_attention_heads))


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")])
def test_weights_that_the_type_holds_come_back_bit_for_bit(model, tmp_path, kind, dtype):
    model = model.to(getattr(torch, dtype))
    save_gguf(model, tmp_path / "model.gguf", kind)
    file = open_gguf(tmp_path / "model.gguf")
    assert file.config.replace(initializer_range=1.0) == model.config.replace(initializer_range=1.0)
    found = file.tensors()
    for name, weight in stored_tensors(model).items():
        assert torch.equal(found[name].float(), weight.float()), name


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_quantised_weights_are_within_a_step_of_their_block(model, tmp_path, kind):
    save_gguf(model, tmp_path / "model.gguf", kind)
    found = open_gguf(tmp_path / "model.gguf").tensors()
    for name, weight in stored_tensors(model).items():
        if weight.dim() == 1:
            assert torch.equal(found[name], weight), name
            continue
        blocks, error = weight.unflatten(1, (-1, 32)), (found[name] - weight).unflatten(1, (-1, 32)).abs()
        largest, spread = blocks.abs().amax(2), blocks.amax(2) - blocks.amin(2)
        # half a step, but for q4_0, whose largest value of the other sign may lie a whole step outside
        step = {"q8_0": largest / 254, "q4_0": largest / 8, "q4_1": spread / 30}[kind]
        step = largest / 254 if "embed" in name else step
        assert (error.amax(2) <= step * 1.01 + largest * 2**-10).all(), name


def test_norms_and_embedding_keep_more_bits_and_rows_without_whole_blocks_are_f16(model, tmp_path):
    def types(config, kind):
        save_gguf(SmolLM2ForCausalLM(config, "torch"), tmp_path / "model.gguf", kind)
        return {
            tensor.name: tensor.tensor_type.name
            for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
        }

    found = types(model.config, "q4_0")
    assert "output.weight" not in found and found["token_embd.weight"] == "Q8_0"
    assert {found["output_norm.weight"], found["blk.0.ffn_norm.weight"]} == {"F32"}
    assert found["blk.1.attn_q.weight"] == found["blk.1.ffn_down.weight"] == "Q4_0"
    odd = types(model.config.replace(intermediate_size=500), "q8_0")
    assert odd["blk.0.ffn_down.weight"] == "F16" and odd["blk.0.ffn_up.weight"] == "Q8_0"


def test_tokenizer_and_template_come_back_the_same(model, tokenizer, tmp_path):
    save_gguf(model, tmp_path / "model.gguf", "q8_0", tokenizer, {"name": "a name", "license": "mit"})
    file = open_gguf(tmp_path / "model.gguf")
    found = tokenizer_from_gguf(file)
    assert found.fingerprint() == tokenizer.fingerprint() and found.chat_template == TEMPLATE
    assert found.special_tokens == tokenizer.special_tokens and found.special_ids == tokenizer.special_ids
    assert found.banned_ids(300, (0,)) == tokenizer.banned_ids(300, (0,)), "ids without a token stay so"
    named = {key: file._metadata(f"general.{key}", str) for key in ("name", "license", "architecture")}
    assert named == {"name": "a name", "license": "mit", "architecture": "llama"}


def test_every_end_and_every_template_is_stored(model, tokenizer, tmp_path):
    several = Tokenizer(tokenizer._backend, {"eos_token": "<|im_end|>"}, "a", {"tool_use": "b"})
    model.config = model.config.replace(eos_token_id=(0, 2, 5))
    save_gguf(model, tmp_path / "model.gguf", "f16", several)
    file = open_gguf(tmp_path / "model.gguf")
    assert file.config.eos_token_ids == (2, 0, 5)
    assert tokenizer_from_gguf(file).chat_template == "a"
    assert file._metadata("tokenizer.chat_template.tool_use", str) == "b"


def test_llama_cpp_reads_the_same_text_and_continues_it_with_the_same_tokens(model, tokenizer, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    model = model.half().float()
    save_gguf(model, tmp_path / "model.gguf", "f16", tokenizer)
    theirs = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=256, n_threads=1, n_gpu_layers=0, verbose=False
    )
    assert theirs.metadata["tokenizer.chat_template"] == TEMPLATE
    assert theirs.token_eos() == 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ids
        ours = generate(model, torch.tensor([ids]), max_new_tokens=8, eos_token_id=[])[0, len(ids) :]
        theirs.reset()
        found = theirs.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        assert [next(found) for _ in ours] == ours.tolist()
    theirs.close()


def test_transformers_loads_weights_tokenizer_and_template(model, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    pytest.importorskip("accelerate", reason="transformers' GGUF reader needs accelerate")
    save_gguf(model, tmp_path / "model.gguf", "q4_1", tokenizer)
    load = transformers.AutoModelForCausalLM.from_pretrained
    state = load(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, tensor in open_gguf(tmp_path / "model.gguf").tensors().items():
        assert torch.equal(state[name], tensor), name
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert theirs(TEXTS)["input_ids"] == tokenizer.encode_batch(TEXTS)
    assert theirs.chat_template == TEMPLATE


def test_what_gguf_cannot_hold_is_refused_before_a_file_appears(model, tmp_path):
    def refused(message, *arguments):
        with pytest.raises(UsageError, match=message):
            save_gguf(model, tmp_path / "model.gguf", *arguments)

    refused("type: expected one of f16, .*got 'q5'", "q5")
    words = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")), {})
    refused("expected a tokenizer that is a byte-level BPE that cuts texts as", "f16", words)
    many = train_tokenizer([chr(0x4E00 + one) for one in range(99)] * 2, 400)
    refused(f"of at most 300 tokens, the rows of the embedding, got {len(many)}", "f16", many)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    refused("type q8_0: expected weights within fp16, got 1e[+]06 in model.norm.weight; take bf16", "q8_0")
    assert not any(tmp_path.iterdir())
    save_gguf(model, tmp_path / "model.gguf", "bf16")


def test_adapters_that_are_not_merged_are_refused(model, tmp_path):
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        UsageError, match=r"plain model, got model.layers.0.mlp.extra.bias.*; merge or remove"
    ):
        save_gguf(model, tmp_path / "model.gguf")


def test_a_disk_that_is_full_leaves_the_file_of_before(model, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        with pytest.raises(
            LoadError, match="cannot write model.gguf: File too large; nothing half-written is left"
        ):
            save_gguf(model, path, "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
