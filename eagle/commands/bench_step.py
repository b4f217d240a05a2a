"""`eagle bench step`: where the time of a decoding step goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from eagle.commands.measuring import NEEDS_GPU, open_for_bench, settings, settle_tree
from eagle.commands.options import (
    MODEL_DEFAULT,
    PAPER_TREE,
    DraftDtypeOption,
    DraftOption,
    Dtype,
    DtypeOption,
    Kernels,
    KernelsOption,
    ModelOption,
    TargetDtypeOption,
    TreeOption,
    WeightDtype,
    check_flags,
)
from eagle.commands.outputs import check_out, writing
from eagle.commands.reply import encode_prompt, has_template
from eagle.errors import InvalidInputError


def step(
    model: ModelOption = MODEL_DEFAULT,
    draft: DraftOption = None,
    tree: TreeOption = PAPER_TREE,
    dtype: DtypeOption = Dtype.auto,
    draft_dtype: DraftDtypeOption = WeightDtype.same,
    target_dtype: TargetDtypeOption = WeightDtype.same,
    prompt: Annotated[str, typer.Option("--prompt", help="What is answered.")] = "Explain how a bicycle stays upright.",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of the reply.")] = 128,
    kernels: KernelsOption = Kernels.auto,
    before: Annotated[
        bool, typer.Option("--before", help="Also the model as loaded: PyTorch ops, one by one.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="A file for the figures as JSON.")] = None,
) -> None:
    """Profile a step on a GPU: kernels, gaps, the time between steps; EAGLE and plain decoding."""
    check_flags(tree, kernels, max_new_tokens)
    check_out(out)
    import torch

    if not torch.cuda.is_available():
        raise InvalidInputError(NEEDS_GPU.format("step"))
    from eagle.bench.step_profile import compared, markdown, profile_step
    from eagle.model.triton_kernels import optimize_eagle_with_triton

    loaded = open_for_bench(model, draft, tree, dtype)
    tokenizer = loaded.get_tokenizer()
    ids = encode_prompt(tokenizer, prompt, raw=not has_template(tokenizer))
    weights = {"draft_dtype": draft_dtype.setting, "target_dtype": target_dtype.setting}
    settle_tree(loaded, tree, {"kernels": kernels.value, **weights})
    found = []
    for switched in (False, True) if before else (True,):
        if switched:
            optimize_eagle_with_triton(loaded, kernels=kernels.value, **weights)
        for speculative in (True, False):
            profile = profile_step(loaded, ids, max_new_tokens, speculative=speculative)
            found.append(profile)
            print("\n".join(markdown(profile)), end="\n\n", flush=True)
        print(compared(*found[-2:]), end="\n\n", flush=True)
    if out is not None:
        figures = settings(model, draft, loaded) | {"profiles": [profile.to_json() for profile in found]}
        with writing(out):
            out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
