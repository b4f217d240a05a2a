"""Which function makes the trials of which op."""

from __future__ import annotations

from collections.abc import Callable

from eagle.bench.kernel_ops.acceptance import posterior_trial, update_trial
from eagle.bench.kernel_ops.attention import attention_trial
from eagle.bench.kernel_ops.cache import append_trial, compact_trial, retrieve_trial, rope_trial
from eagle.bench.kernel_ops.layers import (
    add_rms_norm_trial,
    cat_rms_norm_trial,
    draft_input_trial,
    rms_norm_trial,
    swiglu_trial,
)
from eagle.bench.kernel_ops.linear import linear_norm_trial, linear_trial, one_byte_trial, swiglu_linear_trial
from eagle.bench.kernel_ops.tree import finish_trial, grow_trial, positions_trial, topk_trial
from eagle.bench.kernel_ops.trial import Trial

TRIALS: dict[str, Callable[..., Trial]] = {
    "attention_decode": attention_trial,
    "attention_tree": attention_trial,
    "attention_chain": attention_trial,
    "attention_prefill": attention_trial,
    "kv_append": append_trial,
    "kv_retrieve": retrieve_trial,
    "kv_compact": compact_trial,
    "rope_append": rope_trial,
    "topk_log_softmax": topk_trial,
    "grow_tree": grow_trial,
    "finish_tree": finish_trial,
    "evaluate_posterior_greedy": posterior_trial,
    "evaluate_posterior_sampled": posterior_trial,
    "update_inputs": update_trial,
    "draft_input": draft_input_trial,
    "draft_positions": positions_trial,
    "rms_norm": rms_norm_trial,
    "add_rms_norm": add_rms_norm_trial,
    "cat_rms_norm": cat_rms_norm_trial,
    "swiglu": swiglu_trial,
    "linear": linear_trial,
    "linear_int8": one_byte_trial,
    "linear_fp8": one_byte_trial,
    "linear_add_rms_norm": linear_norm_trial,
    "gate_up_swiglu": swiglu_linear_trial,
}
"""Each takes (case, device, poisoned=…)."""
