"""Saving and loading: the same weights come back, transformers reads the folder, a loaded model trains."""

from __future__ import annotations

import json
import stat
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.cli import parse_dtype
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.load import load_model, save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def model():
    config = SmolLM2Config.preset("tiny", eos_token_id=(2, 0), bos_token_id=1, pad_token_id=2)
    return SmolLM2ForCausalLM(config, backend="torch")


@pytest.fixture
def folder(model, tmp_path):
    save_model(model, tmp_path / "saved")
    return tmp_path / "saved"


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_load_gives_back_what_was_saved(model, folder):
    loaded = load_model(folder, "torch")
    assert_same_weights(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in loaded.parameters()) == model.config.num_parameters()
    ids = torch.randint(0, 512, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_folder_holds_three_files_and_the_head_once(folder):
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert HEAD not in file.keys() and EMBEDDING in file.keys()  # noqa: SIM118 - not a dictionary
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["torch_dtype"]) == ("llama", "float32", "float32")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == dict(bos_token_id=1, eos_token_id=[2, 0], pad_token_id=2)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1, "the weights are as readable as the configuration"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_folder_and_agrees(model, tmp_path, dtype):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    model.to(dtype).save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs, report = load(tmp_path / "saved", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.dtype == dtype, "the stored dtype is recorded in config.json"
    assert theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    assert theirs.generation_config.eos_token_id == [2, 0]
    assert_same_weights(model, theirs)
    ids = torch.randint(0, 512, (2, 65))
    with torch.no_grad():
        torch.testing.assert_close(model.float()(ids).logits, theirs.float()(ids).logits, rtol=0, atol=1e-5)


def test_what_transformers_saves_we_load(model, folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "one file")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("one file", "shards"):
        loaded = load_model(tmp_path / name, "torch")
        assert loaded.config == model.config
        assert_same_weights(model, loaded)


def test_redundant_tensors_of_other_writers_are_tolerated(model, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors")
    assert_same_weights(model, load_model(folder, "torch"))


def head_alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


def base_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "rename",
    [
        head_alone,
        base_model,
        lambda tensors: base_model(head_alone(tensors)),
        lambda tensors: {**base_model(tensors), HEAD: tensors[EMBEDDING].clone()},
        lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {**tensors, **{name: t.clone() for name, t in base_model(tensors).items()}},
    ],
    ids=["head alone", "base model", "base model with head alone", "base model and head", "twice", "both"],
)
def test_names_are_understood_as_by_transformers(model, folder, rename):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    path = folder / "model.safetensors"
    save_file(rename(load_file(path)), path, metadata={"format": "pt"})
    assert_same_weights(model, load_model(folder, "torch"))
    assert_same_weights(model, transformers.AutoModelForCausalLM.from_pretrained(folder))


def test_an_index_may_list_the_tied_head(model, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "weights-of-any-name.safetensors")
    save_file({}, folder / "empty.safetensors")
    weight_map = dict.fromkeys([HEAD, *tensors], "weights-of-any-name.safetensors")
    index = {"weight_map": {**weight_map, HEAD: "empty.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_weights(model, load_model(folder, "torch"))


def test_one_tensor_under_two_names_that_differ_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(LoadError, match="model.norm.weight is there twice, under different names"):
        load_model(folder, "torch")


def test_packed_and_compiled_models_save_plain_weights(model, tmp_path):
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != HEAD}
    model.pack()  # parameters become views of shared buffers
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.untyped_storage().nbytes() > weight.nbytes
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    save_model(torch.compile(model, backend="eager"), tmp_path)  # type: ignore[arg-type]
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_a_loaded_model_trains_and_its_file_does_not_change(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder, "torch").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 512, (2, 17))
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_model_can_be_saved_over_the_folder_it_is_mapped_from(folder):
    model = load_model(folder, "torch")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), "the old file is still mapped"
    assert_same_weights(model, load_model(folder, "torch"))


STORED = torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "found"),
    [(None, STORED), ("auto", STORED), ("fp32", torch.float32), (torch.float16, torch.float16)],
)
def test_dtype_is_as_stored_unless_asked_for(model, tmp_path, asked, found):
    save_model(model.bfloat16(), tmp_path)
    loaded = load_model(tmp_path, "torch", dtype=asked)
    assert {parameter.dtype for parameter in loaded.parameters()} == {found}
    assert torch.equal(loaded.model.norm.weight.float(), model.model.norm.weight.float())


def test_mixed_dtypes_load_as_the_wider_one(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor if tensor.dim() == 1 else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    loaded = load_model(folder, "torch")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.embed_tokens.weight, tensors[EMBEDDING].float())


def test_names_of_dtypes():
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype(None) is parse_dtype("auto") is None
    with pytest.raises(UsageError, match="expected one of auto, fp32, .*, got 'int8'"):
        parse_dtype("int8")


def test_special_ids_of_the_generation_config_take_precedence_and_both_end_a_text(folder):
    content = '{"eos_token_id": [5, 6], "pad_token_id": null, "temperature": 0.6}'
    (folder / "generation_config.json").write_text(content)
    config = load_model(folder, "torch").config
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (5, 6, 2, 0), 2)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux has /proc/self/maps")
def test_loading_allocates_no_copy_of_the_weights(folder):
    """The parameters are the mapped file: pages that nothing touches cost nothing."""
    model = load_model(folder, "torch")
    address = model.model.embed_tokens.weight.data_ptr()
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split()[0] for line in lines if line.endswith(str(folder / "model.safetensors"))]
    ranges = [tuple(int(bound, 16) for bound in pair.split("-")) for pair in maps]
    assert any(start <= address < end for start, end in ranges)


class WithValue(SmolLM2ForCausalLM):
    """A model with a second head and a buffer, as reinforcement learning has them."""

    def __init__(self, config, backend="torch", **options):
        super().__init__(config, backend, **options)
        self.value = torch.nn.Linear(config.hidden_size, 1)
        torch.nn.init.constant_(self.value.bias, 0.25)
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_subclass_adds_begins_as_its_constructor_says(model, folder, tmp_path, caplog, dtype):
    loaded = WithValue.from_pretrained(folder, "torch", dtype=dtype)
    (line,) = caplog.messages
    assert (
        line.endswith("left as WithValue makes them: value.weight, value.bias, scale") and str(folder) in line
    )
    assert (
        type(loaded) is WithValue and loaded.value.bias.item() == 0.25 and loaded.scale.tolist() == [2, 2, 2]
    )
    assert loaded.value.weight.dtype == loaded.dtype == parse_dtype(dtype)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, load_model(folder, "torch", dtype=dtype)(ids).logits)
    with torch.no_grad():
        loaded.value.weight.fill_(7.0)
    loaded.save_pretrained(tmp_path / "again")
    again = WithValue.from_pretrained(tmp_path / "again", "torch")
    assert_same_weights(loaded, again)
    assert "value" not in caplog.messages[-1].partition("makes them: ")[2]
    assert again.scale.tolist() == [2, 2, 2]


def test_a_file_without_the_models_own_weights_is_refused_for_a_subclass_too(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LoadError, match="1 tensors missing: model.norm.weight"):
        WithValue.from_pretrained(folder, "torch")
