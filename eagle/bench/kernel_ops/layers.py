"""The trials of the row-wise pieces: norms, SwiGLU and what an EAGLE-3 layer begins with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eagle.bench.kernel_cases import Case
from eagle.bench.kernel_ops.trial import TORCH, Trial, nbytes, relative_error, same
from eagle.model import layers as torch_layers
from eagle.model.triton_kernels.draft_input import draft_input
from eagle.model.triton_kernels.mlp import swiglu
from eagle.model.triton_kernels.norm import add_rms_norm, cat_rms_norm, rms_norm

EPS = 1e-5
EMBEDDED = 4096
"""Rows of the embedding at most: a large model's whole table would take a gigabyte in every set of inputs."""


def norm_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def rms_norm_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """[rows, hidden]."""
    x, weight = _rows(case, device), _gain(case, device)
    return Trial(
        run=lambda: rms_norm(x, weight, EPS),
        rivals={
            TORCH: lambda: torch_layers.rms_norm(x, weight, EPS),
            "F.rms_norm": lambda: F.rms_norm(x, (x.shape[-1],), weight, EPS),
        },
        check=lambda out: relative_error(out, norm_reference(x, weight)),
        traffic=2 * nbytes(x) + nbytes(weight),
        inputs=(x, weight),
    )


def add_rms_norm_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """Two [rows, hidden]."""
    x, residual, weight = _rows(case, device), _rows(case, device), _gain(case, device)

    def check(out: tuple[torch.Tensor, torch.Tensor]) -> float:
        total = x.double() + residual.double()
        return max(relative_error(out[0], norm_reference(total, weight)), relative_error(out[1], total))

    return Trial(
        run=lambda: add_rms_norm(x, residual, weight, EPS),
        rivals={TORCH: lambda: torch_layers.add_rms_norm(x, residual, weight, EPS)},
        check=check,
        traffic=4 * nbytes(x) + nbytes(weight),
        inputs=(x, residual, weight),
    )


def cat_rms_norm_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """The draft's embedding and hidden state, [rows, hidden] each."""
    x, y, gain_x, gain_y = _rows(case, device), _rows(case, device), _gain(case, device), _gain(case, device)

    def by_torch() -> torch.Tensor:
        parts = torch_layers.rms_norm(x, gain_x, EPS), torch_layers.rms_norm(y, gain_y, EPS)
        return torch.cat(parts, -1)

    return Trial(
        run=lambda: cat_rms_norm(x, gain_x, y, gain_y, EPS, EPS),
        rivals={TORCH: by_torch},
        check=lambda out: relative_error(out, torch.cat((norm_reference(x, gain_x), norm_reference(y, gain_y)), -1)),
        traffic=4 * nbytes(x) + nbytes(gain_x, gain_y),
        inputs=(x, y, gain_x, gain_y),
    )


def draft_input_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """Tokens from anywhere in the embedding, hidden states from anywhere in twice as many rows; what is not asked for is
    NaN."""
    size, count, vocab = case.model.hidden, case.rows, min(case.model.vocab, EMBEDDED)
    hidden = torch.randn(1, 2 * count, size, dtype=case.dtype, device=device) * 3
    embedding = torch.randn(vocab, size, dtype=case.dtype, device=device)
    rows = torch.randint(2 * count, (1, count), device=device)
    tokens = torch.randint(vocab, (1, count), device=device)
    gains = _gain(case, device), _gain(case, device)
    if poisoned:
        for source, read in ((hidden[0], rows), (embedding, tokens)):
            kept = source[read[0]]
            source.fill_(float("nan"))
            source[read[0]] = kept
    arguments = (hidden, rows, tokens, embedding, *gains, EPS, EPS)

    def check(out: tuple[torch.Tensor, torch.Tensor]) -> float:
        both, total = out
        embedded = torch.stack([embedding[token] for token in tokens[0].tolist()])
        taken = torch.stack([hidden[0, row] for row in rows[0].tolist()])
        same("the hidden states", total, taken[None])
        wanted = torch.cat((norm_reference(embedded, gains[0]), norm_reference(taken, gains[1])), -1)
        return relative_error(both, wanted[None])

    moved = count * size * hidden.element_size()
    return Trial(
        run=lambda: draft_input(*arguments),
        rivals={TORCH: lambda: torch_layers.draft_input(*arguments)},
        check=check,
        traffic=5 * moved + nbytes(rows, tokens, *gains),
        inputs=(hidden, rows, tokens, embedding, *gains),
    )


def swiglu_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """Two [rows, mlp]."""
    shape = (case.rows, case.model.mlp)
    gate, up = (torch.randn(shape, dtype=case.dtype, device=device) for _ in range(2))

    def check(out: torch.Tensor) -> float:
        wide = gate.double()
        return relative_error(out, wide / (1 + (-wide).exp()) * up.double())

    return Trial(
        run=lambda: swiglu(gate, up),
        rivals={TORCH: lambda: torch_layers.swiglu(gate, up)},
        check=check,
        traffic=3 * nbytes(gate),
        inputs=(gate, up),
    )


def _rows(case: Case, device: torch.device) -> torch.Tensor:
    return torch.randn(case.rows, case.model.hidden, dtype=case.dtype, device=device) * 3


def _gain(case: Case, device: torch.device) -> torch.Tensor:
    return torch.rand(case.model.hidden, dtype=case.dtype, device=device) + 0.5
