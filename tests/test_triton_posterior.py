"""Acceptance and the next state on the device: against loops, sorted distributions and the PyTorch ops."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from eagle.model import verify
from eagle.model.ops import Acceptance, DecodeState, DraftTree, Sampling
from eagle.model.tree import ancestor_words, root_only
from eagle.model.triton_kernels import posterior, sampling
from eagle.model.triton_kernels.posterior import evaluate_posterior, evaluate_posterior_seeded
from eagle.model.triton_kernels.sampling import DrawConfig, draw_keys, philox_uniforms
from eagle.model.triton_kernels.update_inputs import update_inputs, update_inputs_op

DEVICE = "cuda" if CUDA else "cpu"
UNIFORM = torch.full((1, 1), 0.999, device=DEVICE)
SMALL = DrawConfig(chunk=64, stats_warps=1, block=256, draw_warps=4)
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def random_tree(batch: int, nodes: int, vocab: int, generator: torch.Generator) -> DraftTree:
    parents = torch.full((batch, nodes), -1)
    depths = torch.zeros(batch, nodes, dtype=torch.int64)
    for node in range(1, nodes):
        parents[:, node] = torch.randint(max(0, node - 4), node, (batch,), generator=generator)
        depths[:, node] = depths.gather(1, parents[:, node : node + 1])[:, 0] + 1
    tokens = torch.randint(0, vocab, (batch, nodes), generator=generator)
    tree = DraftTree(tokens, parents, depths, ancestor_words(parents, nodes))
    return DraftTree(**{name: value.to(DEVICE) for name, value in vars(tree).items()})


def favour_the_tree(logits: torch.Tensor, tree: DraftTree, generator: torch.Generator, part: float = 0.8) -> None:
    """Raise the logits of that part of the children, so that walks are long."""
    batch, nodes, _ = logits.shape
    for b in range(batch):
        for node in range(1, nodes):
            if torch.rand((), generator=generator) < part:
                logits[b, tree.parents[b, node], tree.tokens[b, node]] = 9.0


def walk(choices: list[int], tree: DraftTree, b: int) -> tuple[list[int], list[int]]:
    """Nodes and tokens of one sequence's path, by loops."""
    parents, tokens = tree.parents[b].tolist(), tree.tokens[b].tolist()
    nodes, path = [0], [choices[0]]
    while True:
        children = [n for n, p in enumerate(parents) if p == nodes[-1] and tokens[n] == path[-1]]
        if not children:
            return nodes, path
        nodes.append(children[-1])
        path.append(choices[children[-1]])


def check_walk(out: Acceptance, choices: torch.Tensor, tree: DraftTree) -> None:
    for b in range(len(choices)):
        nodes, tokens = walk(choices[b].tolist(), tree, b)
        count = int(out.count[b])
        assert out.nodes[b, :count].tolist() == nodes
        assert out.tokens[b, :count].tolist() == tokens
        assert (out.nodes[b, count:] == nodes[-1]).all()
        assert (out.tokens[b, count:] == tokens[-1]).all()


def choose(logits: torch.Tensor, rule: Sampling, uniforms: torch.Tensor) -> tuple[list[int], list[int]]:
    """One row's tokens by sorting, in float64, and which uniforms lie clear of every boundary between shares."""
    scores = logits.double() / rule.temperature
    size = len(scores)
    kept = torch.ones(size, dtype=torch.bool)
    filters = ["k", "p"] if rule.top_k_first else ["p", "k"]
    for name in filters:
        if name == "k" and 0 < rule.top_k < size:
            kept &= scores >= scores[kept].sort(descending=True).values[: rule.top_k][-1]
        if name == "p" and 0 < rule.top_p < 1:
            order = sorted((i for i in range(size) if kept[i]), key=lambda i: (scores[i].item(), i))
            running = scores.exp()[order].cumsum(0) / scores.exp()[order].sum()
            for i, share in zip(order, running, strict=True):
                kept[i] &= bool(share > 1 - rule.top_p)
    shares = torch.where(kept, scores, float("-inf")).softmax(0).cumsum(0)
    tokens = [int((shares > u).int().argmax()) for u in uniforms.double()]
    margin = (shares[:, None] - uniforms.double()).abs().amin(0)
    return tokens, [i for i, clear in enumerate(margin > 2e-6) if clear]


def drawn(logits: torch.Tensor, rule: Sampling, uniforms: torch.Tensor, config: DrawConfig | None) -> list[int]:
    """One token of one row for each uniform: logits [V], uniforms [U]."""
    rows = logits.expand(len(uniforms), 1, -1).contiguous()
    depths = torch.zeros(len(uniforms), 1, dtype=torch.int64, device=DEVICE)
    keys = draw_keys(rows, depths, rule, uniforms[:, None].contiguous(), None, None, config)
    return (2**31 - 1 - keys.view(-1)).tolist()


RULES = [
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.0, top_k=1),
    Sampling(0.8, top_k=3),
    Sampling(1.3, top_k=40),
    Sampling(1.0, top_p=0.9),
    Sampling(0.7, top_p=0.31),
    Sampling(1.0, top_p=1e-6),
    Sampling(0.9, top_p=0.83, top_k=7),
    Sampling(0.9, top_p=0.83, top_k=7, top_k_first=False),
    Sampling(1.7, top_p=0.97, top_k=150),
    Sampling(1.0, top_p=1.0, top_k=10**6),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tokens_follow_the_sorted_distribution(rule: Sampling) -> None:
    for vocab, dtype in ((5, torch.float32), (191, torch.float16), (520, torch.float32)):
        logits = (torch.randn(vocab) * 3).to(dtype)
        uniforms = torch.rand(64 if CUDA else 2)
        wanted, clear = choose(logits, rule, uniforms)
        tokens = drawn(logits.to(DEVICE), rule, uniforms.to(DEVICE), SMALL)
        assert [tokens[i] for i in clear] == [wanted[i] for i in clear]


@pytest.mark.parametrize("first", [True, False], ids=["top_k first", "top_p first"])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (0, 0.05), (3, 0.0), (40, 0.7), (3, 0.6), (200, 0.55)])
def test_ties_are_cut_as_by_a_stable_sort(top_k: int, top_p: float, first: bool) -> None:
    """Logits in steps of 1, so that each threshold falls among many equals."""
    logits = (torch.randn(250) * 1.5).round()
    rule = Sampling(1.0, top_p, top_k, first)
    uniforms = torch.rand(64 if CUDA else 4)
    wanted, clear = choose(logits, rule, uniforms)
    tokens = drawn(logits.to(DEVICE), rule, uniforms.to(DEVICE), SMALL)
    torch_tokens = verify.draw(verify.next_token_probs(logits, rule).expand(len(uniforms), -1), uniforms)
    assert clear
    for i in clear:
        assert tokens[i] == wanted[i] == torch_tokens[i].item()


@pytest.mark.parametrize("rule", [Sampling(1.0, 0.9), Sampling(1.0, 0.9, 9), Sampling(1.0, 0.9, 9, False)], ids=str)
def test_a_row_too_flat_to_be_collected(rule: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "COLLECTED", 8)
    logits, uniforms = torch.randn(500), torch.rand(3)
    wanted, clear = choose(logits, rule, uniforms)
    tokens = drawn(logits.to(DEVICE), rule, uniforms.to(DEVICE), SMALL)
    assert [tokens[i] for i in clear] == [wanted[i] for i in clear]


@pytest.mark.parametrize("rule", [Sampling(1.0), Sampling(1.0, 0.999), Sampling(1.0, 0.0, 5)], ids=str)
def test_impossible_tokens_are_never_drawn(rule: Sampling) -> None:
    logits = torch.full((200,), float("-inf"))
    logits[[3, 77, 150]] = torch.tensor([1.0, 0.0, 1.0])
    uniforms = torch.tensor([0.0, 0.3, 0.5, 0.9, 1 - 2**-24], device=DEVICE)
    assert drawn(logits.to(DEVICE), rule, uniforms, SMALL) == [3, 3, 77, 150, 150]


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    nodes=st.integers(1, 20),
    vocab=st.integers(2, 300),
    tied=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_greedy(batch: int, nodes: int, vocab: int, tied: bool, half: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(batch, nodes, vocab, generator)
    logits = torch.randn(batch, nodes, vocab, generator=generator)
    logits = logits.round() if tied else logits
    favour_the_tree(logits, tree, generator)
    logits = logits.to(DEVICE, torch.float16 if half else torch.float32)
    out = evaluate_posterior(logits, tree, nodes, Sampling())
    lowest = [[min(i for i in range(vocab) if row[i] == row.max()) for row in rows] for rows in logits.cpu()]
    check_walk(out, torch.tensor(lowest), tree)
    wanted = verify.evaluate_posterior(
        logits.cpu(), DraftTree(*(x.cpu() for x in vars(tree).values())), nodes, Sampling()
    )
    for name, value in vars(wanted).items():
        assert torch.equal(getattr(out, name).cpu(), value), name


@pytest.mark.parametrize("rule", [RULES[1], RULES[8], RULES[5]], ids=str)
def test_a_sampled_walk(rule: Sampling) -> None:
    generator = torch.Generator().manual_seed(len(str(rule)))
    tree = random_tree(2, 10, 90, generator)
    logits = torch.randn(2, 10, 90, generator=generator)
    favour_the_tree(logits, tree, generator, part=1.0)
    uniforms = torch.rand(2, 10, generator=generator).to(DEVICE)
    out = evaluate_posterior(logits.to(DEVICE), tree, 10, rule, uniforms)
    assert out.count.max() > 2
    choices = torch.zeros(2, 10, dtype=torch.int64)
    for b in range(2):
        for node in range(10):
            choices[b, node] = choose(logits[b, node], rule, uniforms[b, tree.depths[b, node], None].cpu())[0][0]
    check_walk(out, choices, tree)
    torch_tree = DraftTree(*(x.cpu() for x in vars(tree).values()))
    wanted = verify.evaluate_posterior(logits, torch_tree, 10, rule, uniforms.cpu())
    assert torch.equal(out.count.cpu(), wanted.count)
    for b, count in enumerate(wanted.count):
        assert torch.equal(out.tokens[b, :count].cpu(), wanted.tokens[b, :count])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_numbers_on_the_device_go_before_the_fields(rule: Sampling) -> None:
    """One object serves all settings of its kind, also in the PyTorch op."""
    generator = torch.Generator().manual_seed(2)
    tree = random_tree(2, 8, 90, generator)
    logits = torch.randn(2, 8, 90, generator=generator).to(DEVICE)
    uniforms = torch.rand(2, 8, generator=generator).to(DEVICE)
    held = rule.on(logits.device)
    assert held.held.dtype == torch.float32
    for temperature, top_p, top_k in ((0.4, 0.6, 2), (1.7, 0.95, 1)):
        other = replace(rule, temperature=temperature)
        other = replace(other, top_p=top_p) if other.cuts_share else other
        other = replace(other, top_k=top_k) if other.cuts_rank(90) else other
        assert other.kind(90) == held.kind(90)
        held.held.copy_(other.on(logits.device).held)
        for op in (evaluate_posterior, verify.evaluate_posterior):
            out, wanted = (op(logits, tree, 8, each, uniforms) for each in (held, other))
            for name, value in vars(wanted).items():
                assert torch.equal(getattr(out, name), value), (name, op.__module__)


def test_a_share_too_small_for_float32_keeps_the_best_token() -> None:
    logits = torch.randn(1, 1, 90, device=DEVICE)
    for op in (evaluate_posterior, verify.evaluate_posterior):
        out = op(logits, root_only(torch.zeros(1, dtype=torch.int64, device=DEVICE)), 1, Sampling(1.0, 1e-9), UNIFORM)
        assert out.tokens.item() == logits.argmax()


def test_a_huge_rank_is_off() -> None:
    logits, root = torch.randn(1, 1, 90, device=DEVICE), root_only(torch.zeros(1, dtype=torch.int64, device=DEVICE))
    huge, off = (evaluate_posterior(logits, root, 1, Sampling(1.0, 0.9, k), UNIFORM) for k in (10**400, 0))
    assert torch.equal(huge.tokens, off.tokens)


def test_kinds() -> None:
    assert Sampling().kind(50) == Sampling(top_k=5).kind(50) == ("greedy",)
    assert Sampling(0.5, 1.0, 50).kind(50) == Sampling(2.0).kind(50) == ("drawn",)
    assert Sampling(1.0, 0.9, 5).kind(50) == ("drawn", "top_k", "top_p")
    assert Sampling(1.0, 0.9, 5, top_k_first=False).kind(50) == ("drawn", "top_p", "top_k")
    assert Sampling(1.0, 0.9).kind(50) == Sampling(1.0, 0.9, top_k_first=False).kind(50)


def test_a_seed_gives_each_position_one_uniform() -> None:
    seeds = torch.tensor([3, 2**40 + 5, 3], device=DEVICE)
    offsets = torch.tensor([0, 7, 4], device=DEVICE)
    uniforms = philox_uniforms(seeds, offsets, 300)
    assert torch.equal(uniforms[0, 4:], uniforms[2, :-4])
    assert not torch.equal(uniforms[0], uniforms[1])
    assert 0 <= uniforms.min() < 0.05 < 0.95 < uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 0.05


@pytest.mark.parametrize("rule", [Sampling(), Sampling(0.9), Sampling(1.1, 0.9, 12)], ids=str)
def test_seeded_equals_the_same_uniforms_and_plain_decoding(rule: Sampling) -> None:
    generator = torch.Generator().manual_seed(5)
    tree = random_tree(2, 6, 80, generator)
    logits = torch.randn(2, 6, 80, generator=generator)
    favour_the_tree(logits, tree, generator)
    logits = logits.to(DEVICE)
    seeds, offsets = torch.tensor([11, 12], device=DEVICE), torch.tensor([0, 30], device=DEVICE)
    out = evaluate_posterior_seeded(logits, tree, 6, rule, seeds, offsets)
    given = evaluate_posterior(logits, tree, 6, rule, philox_uniforms(seeds, offsets, 6))
    for name, value in vars(given).items():
        assert torch.equal(getattr(out, name), value), name
    for step in range(int(out.count.min())):
        row = logits.gather(1, out.nodes[:, step, None, None].expand(-1, 1, 80))
        plain = evaluate_posterior_seeded(
            row, root_only(tree.tokens[:, 0].contiguous()), 1, rule, seeds, offsets + step
        )
        assert torch.equal(plain.tokens[:, 0], out.tokens[:, step])


def test_bad_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = random_tree(2, 4, 10, torch.Generator())
    logits = torch.randn(2, 4, 10, device=DEVICE)
    with pytest.raises(ValueError, match=r"needs uniforms \[B, 3\], got None"):
        evaluate_posterior(logits, tree, 3, Sampling(1.0))
    with pytest.raises(ValueError, match=r"uniforms is \(2, 2\)"):
        evaluate_posterior(logits, tree, 3, Sampling(1.0), torch.rand(2, 2, device=DEVICE))
    wrong = replace(Sampling(1.0), held=torch.ones(4, device=DEVICE))
    with pytest.raises(ValueError, match=r"sampling.held is \(4,\)"):
        evaluate_posterior(logits, tree, 3, wrong, torch.rand(2, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"tree.tokens is \(2, 4\)"):
        evaluate_posterior(logits[:, :3].contiguous(), tree, 3, Sampling())
    with pytest.raises(ValueError, match="rows at one stride"):
        evaluate_posterior(torch.randn(2, 5, 10, device=DEVICE)[:, :4], tree, 3, Sampling())
    with pytest.raises(ValueError, match=r"\(2, 4, 10\) is torch.float64"):
        evaluate_posterior(logits.double(), tree, 3, Sampling())
    with pytest.raises(ValueError, match=r"seeds is \(2,\) torch.int32"):
        evaluate_posterior_seeded(logits, tree, 3, Sampling(1.0), tree.tokens[:, 0].int(), tree.tokens[:, 0])
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    tree.parents[0, 2] = 4
    with pytest.raises(ValueError, match=r"tree.parents .* expected values from -1 to 3"):
        evaluate_posterior(logits, tree, 3, Sampling())


@pytest.mark.parametrize("wrong", [-0.5, 1.0, 2.0, float("nan"), float("inf")])
def test_debug_mode_reads_the_uniforms(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, logits = random_tree(2, 4, 10, torch.Generator()), torch.randn(2, 4, 10, device=DEVICE)
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    uniforms = torch.rand(2, 3, device=DEVICE)
    uniforms[0, 0] = 0.0
    evaluate_posterior(logits, tree, 3, Sampling(0.8), uniforms)
    uniforms[1, 2] = wrong
    with pytest.raises(ValueError, match=r"uniforms must lie in \[0, 1\)"):
        evaluate_posterior(logits, tree, 3, Sampling(0.8), uniforms)
    evaluate_posterior(logits, tree, 3, Sampling(), uniforms)  # greedy reads none


def test_debug_mode_reads_the_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, logits = random_tree(2, 4, 10, torch.Generator()), torch.randn(2, 4, 10, device=DEVICE)
    seeds = torch.tensor([-(2**40), 7], device=DEVICE)
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    for most in (0, 2**31 - 3):
        evaluate_posterior_seeded(logits, tree, 3, Sampling(0.8), seeds, torch.tensor([0, most], device=DEVICE))
    for wrong in (-1, -1000, 2**31 - 2):
        with pytest.raises(ValueError, match=rf"offsets must lie .*\[0, {wrong}\]"):
            evaluate_posterior_seeded(logits, tree, 3, Sampling(0.8), seeds, torch.tensor([0, wrong], device=DEVICE))


def random_state(batch: int, generator: torch.Generator, path: int) -> DecodeState:
    def whole(high: int) -> torch.Tensor:
        return torch.randint(0, high, (batch,), generator=generator).to(DEVICE)

    tokens = torch.zeros(batch, path, dtype=torch.int64, device=DEVICE)
    return DecodeState(
        kv_len=whole(10**12),
        root=whole(50),
        tokens=tokens,
        features=None,
        count=whole(path),
        generated=whole(100),
        budget=whole(2 * path),
        done=whole(4) == 0,
    )


def random_step(batch: int, path: int, nodes: int, size: int, generator: torch.Generator):
    count = torch.randint(1, path + 1, (batch,), generator=generator)
    accepted = torch.randint(0, nodes, (batch, path), generator=generator)
    repeated = torch.minimum(torch.arange(path), count[:, None] - 1)  # as both ops fill the entries beyond the count
    tokens = torch.randint(0, 30, (batch, path), generator=generator).to(DEVICE)
    features = torch.randn(batch, nodes, size, generator=generator).to(DEVICE)
    return Acceptance(accepted.gather(1, repeated).to(DEVICE), tokens, count.to(DEVICE)), features


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    path=st.integers(1, 9),
    nodes=st.integers(1, 20),
    size=st.sampled_from([1, 7, 64, 1030]),
    ends=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_update_equals_the_pytorch_op(batch: int, path: int, nodes: int, size: int, ends: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = random_state(batch, generator, path)
    accepted, features = random_step(batch, path, nodes, size, generator)
    eos = torch.randint(0, 30, (ends,), generator=generator).to(DEVICE)
    out = update_inputs(state, accepted, features, eos)
    for name, value in vars(verify.update_inputs(state, accepted, features, eos)).items():
        assert torch.equal(getattr(out, name), value), name


def test_update_in_place_and_without_features() -> None:
    generator = torch.Generator().manual_seed(8)
    state = random_state(3, generator, 5)
    accepted, features = random_step(3, 5, 6, 10, generator)
    eos = torch.tensor([4, 9], device=DEVICE)
    wanted = verify.update_inputs(state, accepted, features, eos)
    state.features = torch.full((3, 5, 10), float("nan"), device=DEVICE)
    before = {name: value.data_ptr() for name, value in vars(state).items()}
    assert update_inputs(state, accepted, features, eos, out=state) is state
    assert before == {name: value.data_ptr() for name, value in vars(state).items()}
    for name, value in vars(wanted).items():
        assert torch.equal(getattr(state, name), value), name
    assert update_inputs(state, accepted, None, eos).features is None


def test_update_reads_no_entry_beyond_the_count() -> None:
    accepted, features = random_step(2, 4, 5, 6, torch.Generator().manual_seed(1))
    accepted.count.fill_(2)
    accepted.nodes[:, 2:] = -(2**40)
    accepted.tokens[:, 2:] = 3
    state = random_state(2, torch.Generator().manual_seed(2), 4)
    state.budget.fill_(9)
    state.done.fill_(False)
    new = update_inputs(state, accepted, features, torch.tensor([3], device=DEVICE))
    assert torch.isfinite(new.features).all()
    assert torch.equal(new.features[0, 1], features[0, accepted.nodes[0, 1]])
    assert not (new.done & (accepted.tokens[:, :2] != 3).all(1)).any()


def test_bad_state(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted, features = random_step(2, 4, 5, 6, torch.Generator())
    state = random_state(2, torch.Generator(), 4)
    eos = torch.tensor([3], device=DEVICE)
    with pytest.raises(ValueError, match=r"features is \(2, 30\); expected \[B, N, F\]"):
        update_inputs(state, accepted, features.flatten(1), eos)
    with pytest.raises(ValueError, match=r"accepted.count is \(1,\)"):
        update_inputs(state, Acceptance(accepted.nodes, accepted.tokens, accepted.count[:1]), features, eos)
    with pytest.raises(ValueError, match=r"eos is \(1,\) torch.int32"):
        update_inputs(state, accepted, features, eos.int())
    with pytest.raises(ValueError, match=r"out.features and features"):
        update_inputs(state, accepted, features, eos, out=state)
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    accepted.count[0], accepted.nodes[0] = 2, torch.tensor([0, 4, 99, 99])
    update_inputs(state, accepted, features, eos)  # entries beyond the count may be anything
    accepted.nodes[0, 1] = 5
    with pytest.raises(ValueError, match=r"accepted.nodes .* expected values from 0 to 4"):
        update_inputs(state, accepted, features, eos)


def test_registered_operators() -> None:
    tree = random_tree(1, 2, 30, torch.Generator())
    logits = torch.randn(1, 2, 30, device=DEVICE)
    nodes = (tree.tokens, tree.parents, tree.depths, 3)
    uniforms = torch.rand(1, 3, device=DEVICE)
    torch.library.opcheck(posterior.evaluate_posterior_op, (logits, *nodes, 0.0, 0.0, 0, True, None))
    torch.library.opcheck(posterior.evaluate_posterior_op, (logits, *nodes, 0.9, 0.8, 0, True, uniforms))
    seeds = torch.ones(1, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(posterior.evaluate_posterior_seeded_op, (logits, *nodes, 0.9, 0.0, 0, True, seeds, seeds + 1))


@pytest.mark.parametrize("with_features", [True, False])
def test_registered_update(with_features: bool) -> None:
    accepted, features = random_step(2, 4, 5, 6, torch.Generator())
    state = random_state(2, torch.Generator(), 4)
    own = (state.kv_len, state.root, state.generated, state.budget, state.done)
    eos = torch.tensor([3], device=DEVICE)
    steps = (accepted.nodes, accepted.tokens, accepted.count)
    torch.library.opcheck(update_inputs_op, (*own, *steps, features if with_features else None, eos))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_large_vocabulary(rule: Sampling, dtype: torch.dtype) -> None:
    """The default configuration, spread like a language model's logits."""
    logits = (torch.randn(128256) * 2.5).to(dtype)
    logits[torch.randperm(128256)[:40]] += 12
    uniforms = torch.rand(8)
    wanted, clear = choose(logits.float(), rule, uniforms)
    tokens = drawn(logits.cuda(), rule, uniforms.cuda(), None)
    assert [tokens[i] for i in clear] == [wanted[i] for i in clear]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rule", [Sampling(), Sampling(0.8), Sampling(0.8, 0.9, 50)], ids=str)
def test_captured(rule: Sampling) -> None:
    generator = torch.Generator().manual_seed(1)
    tree = random_tree(1, 60, 32000, generator)
    logits = torch.randn(1, 60, 32000, device="cuda", dtype=torch.bfloat16)
    seeds, offsets = torch.tensor([1], device="cuda"), torch.tensor([0], device="cuda")
    held = rule.on(logits.device)
    evaluate_posterior_seeded(logits, tree, 60, held, seeds, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = evaluate_posterior_seeded(logits, tree, 60, held, seeds, offsets)
    for temperature in (rule.temperature, 1.3 * rule.temperature):
        rule = replace(rule, temperature=temperature)
        held.held.copy_(rule.on(logits.device).held)
        logits.normal_()
        favour_the_tree(logits, tree, generator)
        offsets += 3
        graph.replay()
        wanted = evaluate_posterior_seeded(logits, tree, 60, rule, seeds, offsets)
        assert torch.equal(out.tokens, wanted.tokens)
        assert torch.equal(out.count, wanted.count)
