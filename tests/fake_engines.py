"""Stand-ins for vLLM and SGLang with the part of their offline APIs that the peers use, as packages in a folder.

Their models write prompt-dependent numbers. An environment variable FAKE_<ENGINE> makes them crash, hang or differ.
"""

from __future__ import annotations

from pathlib import Path

COMMON = """
import os, subprocess, sys, time

def behave(name, speculative):
    how = os.environ.get("FAKE_" + name, "")
    if how == "crash" and speculative:
        print("INFO: starting")
        raise ValueError("the head has 32000 rows,\\n  not 40")
    if how == "exit":
        print("no kernel image is available")
        os._exit(3)
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(os.environ["FAKE_CHILD"], "w").write(str(child.pid))
        print("compiling", flush=True)
        time.sleep(600)
    return how

def tokens(ids, count, differ):
    found = [(sum(ids) + index) % 97 for index in range(count)]
    return found[:-1] + [98] if differ and sum(ids) % 2 else found
"""

VLLM = """
from fake_common import behave, tokens

class SamplingParams:
    def __init__(self, *, temperature, max_tokens):
        assert temperature == 0.0
        self.max_tokens = max_tokens

class Metric:
    def __init__(self, name, value):
        self.name, self.value = name, value

class Output:
    def __init__(self, token_ids):
        self.token_ids, self.outputs = token_ids, [self]

class LLM:
    def __init__(self, *, model, dtype, max_num_seqs, enable_prefix_caching, disable_log_stats, speculative_config=None):
        assert not enable_prefix_caching and not disable_log_stats and dtype in ("auto", "float32")
        if speculative_config is not None:
            assert set(speculative_config) == {"method", "model", "num_speculative_tokens"}, speculative_config
            assert speculative_config["method"] == "eagle3"
        self.speculative = speculative_config is not None
        self.how, self.drafts = behave("VLLM", self.speculative), 0

    def generate(self, prompts, sampling, use_tqdm=True):
        [prompt] = prompts
        self.drafts += (sampling.max_tokens - 1) // 2
        ids = prompt["prompt_token_ids"]
        return [Output(tokens(ids, sampling.max_tokens, self.how == "differ" and self.speculative))]

    def get_metrics(self):
        return [Metric("vllm:spec_decode_num_drafts", self.drafts), Metric("vllm:other", 7)]
"""

SGLANG = """
from fake_common import behave, tokens

class Engine:
    def __init__(self, *, model_path, dtype, disable_radix_cache, **speculative):
        assert disable_radix_cache
        names = ("algorithm", "draft_model_path", "num_steps", "eagle_topk", "num_draft_tokens")
        assert set(speculative) in (set(), {"speculative_" + name for name in names}), speculative
        assert speculative.get("speculative_algorithm", "EAGLE3") == "EAGLE3"
        self.speculative = speculative
        self.how = behave("SGLANG", bool(speculative))

    def generate(self, prompt=None, sampling_params=None, input_ids=None):
        count = sampling_params["max_new_tokens"]
        meta = {"spec_verify_ct": (count - 1) // 4} if self.speculative else {}
        return {"text": "", "output_ids": tokens(input_ids, count, False), "meta_info": meta}

    def shutdown(self):
        print("shut down")
"""


def write_engines(folder: Path, *names: str) -> Path:
    """Put the engines ``names`` into ``folder``, which then goes onto PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fake_common.py").write_text(COMMON)
    for name, text in (("vllm", VLLM), ("sglang", SGLANG)):
        if name in names:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(text)
            info = folder / f"{name}-9.1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.1\n")
    return folder
