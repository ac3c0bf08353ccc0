"""SmolLM2 in lm_eval: the same numbers and texts as lm_eval's own `hf` model on the same weights."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before lm_eval imports the hub's library
pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import lm_eval  # noqa: E402
import torch  # noqa: E402
from evaluate_tasks import TASKS, documents, write_tasks  # noqa: E402
from generation_cases import tiny_model, tiny_tokenizer  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from smollm2.errors import UsageError  # noqa: E402
from smollm2.harness import HarnessModel  # noqa: E402
from smollm2.pretrained.tokenizer import IM_END, IM_START, Tokenizer  # noqa: E402

LIMIT = 128
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = {"bos_token": IM_START, "eos_token": IM_END, "unk_token": "<|endoftext|>", "pad_token": IM_END}


@pytest.fixture(scope="module", params=["base", "instruct"])
def both(request, tmp_path_factory):
    """Ours and theirs on one checkpoint."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny_tokenizer()
    if request.param == "instruct":
        tokenizer = Tokenizer(tokenizer._backend, ROLES, TEMPLATE)
    ends = {} if request.param == "base" else {"eos_token_id": 2, "bos_token_id": 1}
    sizes = dict(vocab_size=tokenizer.vocab_size, max_position_embeddings=LIMIT, **ends)
    tiny_model(**sizes).save_pretrained(folder)
    tokenizer.save(folder)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3)
    return HarnessModel(str(folder), "cpu", "fp32", batch_size=3), theirs


def asked(*arguments):
    return [SimpleNamespace(args=one, task_name="test") for one in arguments]


def test_tokens_and_special_ids_are_theirs(both):
    ours, theirs = both
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    assert ours.max_length == theirs.max_length
    for pair in (
        ("a dog ", "jumps"),
        ("a\n", " fox"),
        ("<|im_start|>the", " fox <|im_end|>"),
        ("é ", "漢字"),
    ):
        assert ours._encode_pair(*pair) == theirs._encode_pair(*pair)


def test_log_likelihoods_and_greediness_are_theirs(both):
    ours, theirs = both
    question = "the quick brown fox jumps over"
    requests = asked(
        *[(question, answer) for answer in (" the lazy dog", " a dog", " the", " fox", "s")],
        (question + "  ", "the lazy dog"),
        ("", "the quick brown fox"),
        ("", "<|im_start|>the fox"),  # begins with what would be put before it
        ("<|im_start|>", "x"),
        (question * 9, " the lazy dog"),  # cut from the left, each differently
        (question * 9, " the lazy dog again"),
        ("a", "the lazy dog jumps over" * 4),
    )
    found, expected = ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True)
    assert [best for _, best in found] == [best for _, best in expected]
    for (nats, _), (other, _) in zip(found, expected, strict=True):
        assert nats == pytest.approx(other, abs=1e-4, rel=1e-6)


def test_greedy_continuations_are_recognised_as_by_theirs(both):
    ours, theirs = both
    ids = ours.tok_encode("the quick brown fox jumps over")
    tokens = theirs.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    best = tokens[0, len(ids) :].tolist()
    requests = [(None, ids, best), (None, ids, best[:1]), (None, ids, [*best[:4], best[4] ^ 1])]
    found, expected = (model._loglikelihood_tokens(requests, disable_tqdm=True) for model in both)
    assert [one[1] for one in found] == [one[1] for one in expected] == [True, True, False]


def test_whole_texts_are_scored_as_theirs(both):
    ours, theirs = both
    texts = asked(("the quick brown fox",), ("jumps over the lazy dog " * 30,), ("x",))
    found, expected = ours.loglikelihood_rolling(texts, True), theirs.loglikelihood_rolling(texts, True)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_answers_are_theirs(both):
    ours, theirs = both
    starts = ["the quick", "a lazy dog", "the quick brown fox jumps over" * 9, "dog"]
    long = theirs.generate_until(asked(("the quick", {"until": [], "max_gen_toks": 24})))[0]
    options = ({"until": [], "max_gen_toks": 24}, {"until": [long[9:11], "zzz"], "max_gen_toks": 24})
    requests = asked(*[(start, given) for given in options for start in starts])
    answers = ours.generate_until(requests, True)
    assert answers == theirs.generate_until(requests, True)
    assert answers[len(starts)] == long[: long.index(long[9:11])]


def test_conversations_are_theirs(both):
    ours, theirs = both
    if ours.tokenizer.chat_template is None:
        with pytest.raises(UsageError, match="no chat template"):
            ours.apply_chat_template([{"role": "user", "content": "hello"}])
        return
    talk = [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "the answer is "}]
    assert ours.apply_chat_template(talk[:1]) == theirs.apply_chat_template(talk[:1])
    assert ours.apply_chat_template(talk, False) == theirs.apply_chat_template(talk, False)
    assert ours.chat_template(True) == theirs.chat_template(True)


@pytest.mark.parametrize("both", ["instruct"], indirect=True)
def test_tasks_come_to_the_same_scores(both, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = TaskManager(include_path=str(write_tasks(tmp_path, 4)), include_defaults=False)
    found, expected = (
        lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["samples"]
        for model in both
    )
    for name in TASKS:
        for one, other in zip(found[name], expected[name], strict=True):
            for (mine,), (his,) in zip(one["resps"], other["resps"], strict=True):
                numbers = mine if isinstance(mine, tuple) else (mine,)
                assert mine == his or numbers == pytest.approx(
                    his if isinstance(his, tuple) else (his,), abs=1e-4, rel=1e-6
                )
    assert len(found["pydoc_choice"]) == len(documents(4))


def test_what_a_task_asks_for_and_cannot_be_had_is_named(both):
    ours, _ = both
    with pytest.raises(UsageError, match="generation_kwargs: .*num_beams"):
        ours.generate_until(asked(("the", {"num_beams": 4, "max_gen_toks": 4})))
    with pytest.raises(UsageError, match="max_gen_toks"):
        ours.generate_until(asked(("the", {"max_gen_toks": LIMIT})))
    with pytest.raises(UsageError, match="batch_size"):
        HarnessModel("nothing", batch_size="some")
