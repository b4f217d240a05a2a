"""The plain PyTorch table: what serves on a CPU, and what every kernel is compared with."""

from eagle.model.attention import attention
from eagle.model.kv_cache import kv_append, kv_compact, kv_retrieve
from eagle.model.layers import (
    add_rms_norm,
    cat_rms_norm,
    draft_input,
    gate_up_swiglu,
    linear,
    linear_add_rms_norm,
    rms_norm,
    rope_append,
    swiglu,
)
from eagle.model.ops import Ops
from eagle.model.tree import draft_positions, finish_tree, grow_tree, topk_log_softmax
from eagle.model.verify import evaluate_posterior, update_inputs

TORCH_OPS = Ops(
    attention=attention,
    kv_append=kv_append,
    kv_retrieve=kv_retrieve,
    kv_compact=kv_compact,
    rope_append=rope_append,
    draft_positions=draft_positions,
    topk_log_softmax=topk_log_softmax,
    grow_tree=grow_tree,
    finish_tree=finish_tree,
    evaluate_posterior=evaluate_posterior,
    update_inputs=update_inputs,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    cat_rms_norm=cat_rms_norm,
    draft_input=draft_input,
    swiglu=swiglu,
    linear=linear,
    gate_up_swiglu=gate_up_swiglu,
    linear_add_rms_norm=linear_add_rms_norm,
)
