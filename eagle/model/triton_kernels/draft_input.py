"""What an EAGLE-3 layer begins with, in one launch: the rows of the hidden state that go on, the embedding look-up, both
norms and their concatenation.

Contract. The meaning and the roundings are those of `eagle.model.layers.draft_input`. hidden and embedding are float16,
bfloat16 or float32, of one dtype, with a contiguous last dimension and any other strides; rows and tokens are int64. A
token or a row out of range gives zeros in place of its values; EAGLE_DEBUG=1 turns it into a ValueError. A program owns
half an output row and its block depends on H alone, so a row's result depends on no other row. Shapes come from the
arguments alone and nothing is read on the host: safe under CUDA-graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.dense import check_range
from eagle.model.triton_kernels.norm import norm_config, normalise
from eagle.model.triton_kernels.overlap import await_earlier, overlaps
from eagle.model.triton_kernels.rows import check_float, check_like, check_vector


@triton.jit(do_not_specialize=["count", "sources"])
def _draft_input_kernel(
    hidden,  # [B, R, H]
    rows,  # [B, T] int64 or None: row t is row t of hidden
    tokens,  # [B, T] int64
    embedding,  # [V, H]
    embedding_weight,  # [H]
    hidden_weight,  # [H]
    both,  # [B, T, 2 H], contiguous
    total,  # [B, T, H], contiguous; written where there are rows
    count,  # T
    sources,  # R
    vocab,
    k,
    hidden_b,
    hidden_t,
    rows_b,
    rows_t,
    tokens_b,
    tokens_t,
    embedding_stride,
    embedding_eps,
    hidden_eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    dtype: tl.constexpr = hidden.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    b, t = row // count, row % count
    at = tl.arange(0, BLOCK)
    inside = at < k
    if half == 0:
        token = tl.load(tokens + b * tokens_b + t * tokens_t)
        found = at < tl.where((token >= 0) & (token < vocab), k, 0)
        raw = tl.load(embedding + token * embedding_stride + at, mask=found, other=0.0)
        gain = tl.load(embedding_weight + at, mask=inside, other=0.0).to(tl.float32)
        eps = embedding_eps
    else:
        source = t
        if rows is not None:
            source = tl.load(rows + b * rows_b + t * rows_t)
        found = at < tl.where((source >= 0) & (source < sources), k, 0)
        raw = tl.load(hidden + b * hidden_b + source * hidden_t + at, mask=found, other=0.0)
        if rows is not None:
            tl.store(total + row * k + at, raw, mask=inside)
        gain = tl.load(hidden_weight + at, mask=inside, other=0.0).to(tl.float32)
        eps = hidden_eps
    normed = normalise(raw.to(tl.float32), gain, k, eps, dtype)
    tl.store(both + row * 2 * k + half * k + at, normed.to(both.dtype.element_ty), mask=inside)


def draft_input(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    embedding_weight: torch.Tensor,
    hidden_weight: torch.Tensor,
    embedding_eps: float,
    hidden_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An EAGLE-3 layer's attention input and residual stream.

    hidden: [B, R, H]; rows: [B, T] int64, the rows of ``hidden`` that go on, or None for all in turn (T = R); tokens:
    [B, T] int64; embedding: [V, H]; weights: [H]. Returns ``cat(rms_norm(embedding[tokens]), rms_norm(hidden[rows]))``
    [B, T, 2 H] and ``hidden[rows]`` [B, T, H], which without rows is ``hidden`` itself. Raises ValueError for a dtype,
    device, stride or size outside the module's contract.
    """
    check_float(hidden, "hidden")
    fits = hidden.dim() == 3 and tokens.dim() == 2 and tokens.shape[0] == hidden.shape[0] and embedding.dim() == 2
    if not fits or embedding.shape[1] != hidden.shape[2] or (rows is None and tokens.shape != hidden.shape[:2]):
        raise ValueError(
            f"hidden is {tuple(hidden.shape)}, tokens {tuple(tokens.shape)} and embedding {tuple(embedding.shape)}; "
            "expected [B, R, H], [B, T] and [V, H], with T = R where no rows are given"
        )
    (batch, count), (vocab, k) = tokens.shape, embedding.shape
    check_like(tokens, "tokens", hidden, (batch, count), torch.int64)
    check_like(embedding, "embedding", hidden, (vocab, k), hidden.dtype)
    if rows is not None:
        check_like(rows, "rows", hidden, (batch, count), torch.int64)
        check_range(rows, "rows", 0, hidden.shape[1])
    check_range(tokens, "tokens", 0, vocab)
    if k > 1 and (hidden.stride(2) != 1 or embedding.stride(1) != 1):
        raise ValueError(
            f"hidden and embedding have strides {hidden.stride()} and {embedding.stride()}; expected a contiguous last "
            "dimension"
        )
    check_vector(embedding_weight, "embedding_weight", hidden, k)
    check_vector(hidden_weight, "hidden_weight", hidden, k, embedding_weight.dtype)
    config = norm_config(k)
    dtype = torch.promote_types(hidden.dtype, embedding_weight.dtype)
    both = hidden.new_empty((batch, count, 2 * k), dtype=dtype)
    total = hidden if rows is None else hidden.new_empty((batch, count, k))
    if batch * count:
        pdl = overlaps(hidden)
        with torch.cuda.device_of(hidden):
            _draft_input_kernel[(batch * count, 2)](
                hidden,
                rows,
                tokens,
                embedding,
                embedding_weight,
                hidden_weight,
                both,
                total,
                count,
                hidden.shape[1],
                vocab,
                k,
                *hidden.stride()[:2],
                *((0, 0) if rows is None else rows.stride()),
                *tokens.stride(),
                embedding.stride(0),
                embedding_eps,
                hidden_eps,
                BLOCK=config.block,
                num_warps=config.num_warps,
                PDL=pdl,
                launch_pdl=pdl,
            )
    return both, total


@torch.library.custom_op("eagle::draft_input", mutates_args=())
def draft_input_op(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    embedding_weight: torch.Tensor,
    hidden_weight: torch.Tensor,
    embedding_eps: float,
    hidden_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draft_input` as a registered operator."""
    both, total = draft_input(
        hidden, rows, tokens, embedding, embedding_weight, hidden_weight, embedding_eps, hidden_eps
    )
    return both, total.clone() if rows is None else total  # an operator's result may not be its argument


@draft_input_op.register_fake
def _(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    embedding_weight: torch.Tensor,
    hidden_weight: torch.Tensor,
    embedding_eps: float,
    hidden_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = hidden.shape[-1]
    dtype = torch.promote_types(hidden.dtype, embedding_weight.dtype)
    return hidden.new_empty((*tokens.shape, 2 * size), dtype=dtype), hidden.new_empty((*tokens.shape, size))
