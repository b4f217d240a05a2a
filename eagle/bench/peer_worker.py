"""One engine, one setting, in a process of its own: ``python peer_worker.py REQUEST.json ANSWER.json``.

It runs under the interpreter in which the engine is installed, which may be another than this package's, so it imports
nothing but the standard library and the engine. Prompts run one after another, greedily, after a round that does not
count. The arguments are those documented for vLLM 0.26, SGLang 0.5 and transformers 5.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script's own folder comes first on the path: its modules must not stand in for an engine's.
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != own]


class Transformers:
    """transformers' ``generate``: plain, or with prompt lookup."""

    def __init__(self, request: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch, self._calls = torch, 0
        options: dict[str, Any] = {"dtype": request["dtype"]}
        if torch.cuda.is_available():
            options["device_map"] = {"": 0}
        self._model = AutoModelForCausalLM.from_pretrained(request["target"], **options).eval()
        self._model.register_forward_pre_hook(self._count)
        self._options = {"max_new_tokens": request["max_new_tokens"], "do_sample": False, **request["options"]}

    def _count(self, *_: Any) -> None:
        self._calls += 1

    def generate(self, ids: list[int]) -> list[int]:
        prompt = self._torch.tensor([ids], device=self._model.device)
        mask = self._torch.ones_like(prompt)
        self._calls -= 1  # prefill's
        with self._torch.inference_mode():
            return self._model.generate(prompt, attention_mask=mask, **self._options)[0, len(ids) :].tolist()

    def steps(self) -> int:
        return self._calls


class VLLM:
    """vLLM's offline API."""

    def __init__(self, request: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        options: dict[str, Any] = {}
        self._speculative = bool(request["options"])
        if self._speculative:
            options["speculative_config"] = {"model": request["head"], **request["options"]}
        # Without prefix caching every run computes its prompt; the counters below need the statistics.
        self._llm = LLM(
            model=request["target"],
            dtype=request["dtype"],
            max_num_seqs=1,
            enable_prefix_caching=False,
            disable_log_stats=False,
            **options,
        )
        self._sampling = SamplingParams(temperature=0.0, max_tokens=request["max_new_tokens"])

    def generate(self, ids: list[int]) -> list[int]:
        [found] = self._llm.generate([{"prompt_token_ids": ids}], self._sampling, use_tqdm=False)
        return list(found.outputs[0].token_ids)

    def steps(self) -> int | None:
        if not self._speculative:
            return None
        drafts = [metric.value for metric in self._llm.get_metrics() if metric.name == "vllm:spec_decode_num_drafts"]
        return int(sum(drafts)) if drafts else None


class SGLang:
    """SGLang's offline engine."""

    def __init__(self, request: dict[str, Any]) -> None:
        import sglang

        options: dict[str, Any] = {}
        if request["options"]:
            options = {"speculative_draft_model_path": request["head"], **request["options"]}
        self._passes: int | None = 0 if options else None
        self._engine = sglang.Engine(
            model_path=request["target"], dtype=request["dtype"], disable_radix_cache=True, **options
        )
        self._sampling = {"temperature": 0.0, "max_new_tokens": request["max_new_tokens"]}

    def generate(self, ids: list[int]) -> list[int]:
        found = self._engine.generate(input_ids=ids, sampling_params=self._sampling)
        if self._passes is not None:
            self._passes += found["meta_info"]["spec_verify_ct"]
        return list(found["output_ids"])

    def steps(self) -> int | None:
        return self._passes

    def close(self) -> None:
        self._engine.shutdown()


class Eagle:
    """This package, under the same clock."""

    def __init__(self, request: dict[str, Any]) -> None:
        from eagle.model.ea_model import EaModel
        from eagle.model.triton_kernels import optimize_eagle_with_triton

        tree = request["options"].get("tree")
        options = {} if tree is None else dict(zip(("total_token", "depth", "top_k"), tree, strict=True))
        self._model = EaModel.from_pretrained(
            base_model_path=request["target"], ea_model_path=request["head"], dtype=request["dtype"], **options
        )
        optimize_eagle_with_triton(self._model)
        self._options = {"max_new_tokens": request["max_new_tokens"], "speculative": tree is not None}
        self._steps = 0

    def generate(self, ids: list[int]) -> list[int]:
        tokens = [token for new in self._model.stream([ids], **self._options) for token in new[0]]
        self._steps += self._model.last_stats.steps
        return tokens

    def steps(self) -> int:
        return self._steps


ENGINES: dict[str, Any] = {"eagle": Eagle, "transformers": Transformers, "vllm": VLLM, "sglang": SGLang}


def run(request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Load the engine and run the prompts. → figures as JSON values, and the engine.

    ``steps``: target passes that follow prefill's, None where the engine does not tell.
    """
    started = time.perf_counter()
    engine = ENGINES[request["engine"]](request)
    load_seconds = time.perf_counter() - started
    for ids in request["prompts"]:  # all: engines compile or capture by a prompt's length
        engine.generate(ids)
    before = engine.steps()
    outputs, seconds = [], []
    for ids in request["prompts"]:
        started = time.perf_counter()
        outputs.append(engine.generate(ids))
        seconds.append(time.perf_counter() - started)
    after = engine.steps()
    steps = None if before is None or after is None else after - before
    return {"outputs": outputs, "seconds": seconds, "steps": steps, "load_seconds": load_seconds}, engine


def main(request_path: str, answer_path: str) -> None:
    answer, engine = run(json.loads(Path(request_path).read_text(encoding="utf-8")))
    # Written before anything is torn down: what then fails does not take the figures along.
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")
    if hasattr(engine, "close"):
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
