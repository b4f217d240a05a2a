"""The step against a loop-based reference: same trees, same accept lengths, same tokens."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_step import head_output, tree_by_loops, walk_by_loops
from tiny import seeded, tiny_draft, tiny_target

from eagle.engine.prefill import prefill
from eagle.engine.state import Caches, Run, slots_needed
from eagle.engine.step import draft_tree, step
from eagle.model.ops import WORD_BITS, DraftTree, Sampling, TreeShape
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS

SHAPES = st.builds(
    lambda depth, top_k, share: TreeShape(2 + int(share * (top_k + depth * top_k**2 - 1)), depth, top_k),
    depth=st.integers(0, 3),
    top_k=st.integers(1, 6),
    share=st.floats(0, 1),
)


class Reference:
    """Target and head without caches, for one sequence."""

    def __init__(self, run: Run, sequence: list[int]) -> None:
        model, self.draft, self.sequence = run.target.model, run.draft, sequence
        self.weights = {name: tensor.double() for name, tensor in self.draft.state_dict().items() if name != "d2t"}
        self.embedding = model.get_input_embeddings().weight.detach()
        self.config = self.draft.config

        @cache
        def forward(path: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                out = model(torch.tensor([[*sequence, *path]]), output_hidden_states=True)
            streams = [out.hidden_states[layer][0] for layer in self.config.aux_layers or (-1,)]
            return out.logits[0, -1], torch.cat(streams, -1)

        self.forward = forward
        features = forward(())[1][: len(sequence) - 1].double()
        if self.config.fc_norm:
            parts = features.split(self.config.target_hidden_size, -1)
            features = torch.cat([self.rms(part, f"fc_norm.{i}.weight") for i, part in enumerate(parts)], -1)
        if self.config.norm_before_fc:
            features = self.rms(features, "input_norm.weight")
        if self.config.kind == "eagle3":
            features = features @ self.weights["fc.weight"].T
        self.pairs = [(row, sequence[t + 1], t) for t, row in enumerate(features)]

        @cache
        def hidden(path: tuple[int, ...]) -> tuple[torch.Tensor, list]:
            pairs = self.pairs
            if path:
                before, pairs = hidden(path[:-1])
                pairs = [*pairs, (before, path[-1], len(sequence) - 2 + len(path))]
            out = head_output(self.weights, self.config, pairs, self.embedding)
            return self.rms(out, "norm.weight") if self.config.norm_output else out, pairs

        self.hidden = hidden

    def rms(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.weights[name]

    def log_probs(self, path: tuple[int, ...]) -> list[tuple[torch.Tensor, int]]:
        out = self.hidden(path)[0]
        if "norm.weight" in self.weights and not self.config.norm_output:
            out = self.rms(out, "norm.weight")
        head = self.weights.get("lm_head.weight", self.embedding)
        logits = (head @ out).float()
        offsets = self.draft.d2t if self.draft.d2t is not None else torch.zeros(len(logits), dtype=torch.int64)
        values = logits - logits.logsumexp(0)
        return [(value, draft + offsets[draft].item()) for draft, value in enumerate(values)]

    def choose(self, path: tuple[int, ...]) -> int:
        return self.forward(path)[0].argmax().item()


def make_run(kind: str, shape: TreeShape, batch: int, **draft_options) -> tuple[Run, list[list[int]]]:
    model = tiny_target(tie_word_embeddings=True).double()
    draft = tiny_draft(model, kind, **draft_options)
    target = Target(model, TORCH_OPS, draft.config.aux_layers)
    draft.attach(target)
    prompts = [torch.randint(17, (int(torch.randint(1, 9, ())),)).tolist() for _ in range(batch)]
    slots = slots_needed(40, shape, speculative=True)
    caches = Caches(target.new_cache(batch, slots), draft.new_cache(batch, slots))
    no_eos = torch.empty(0, dtype=torch.int64)
    return Run(target, draft, TORCH_OPS, shape, Sampling(), caches, no_eos, None), prompts


def assert_same_tree(tree: DraftTree, row: int, wanted: list[tuple]) -> None:
    columns = (tree.tokens[row].tolist(), tree.parents[row].tolist(), tree.depths[row].tolist())
    assert list(zip(*columns, strict=True)) == wanted
    for node in range(len(wanted)):
        seen, ancestor = set(), node
        while ancestor >= 0:
            seen.add(ancestor)
            ancestor = wanted[ancestor][1]
        words = tree.words[row, node].tolist()
        assert {b for b in range(len(words) * WORD_BITS) if words[b // WORD_BITS] >> (b % WORD_BITS) & 1} == seen


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=SHAPES,
    batch=st.integers(1, 4),
    kind=st.sampled_from(["eagle3", "eagle1"]),
    own_vocab=st.booleans(),
    switches=st.sets(st.sampled_from(["norm_before_residual", "norm_output", "fc_norm", "norm_before_fc"]), max_size=3),
    aux=st.sampled_from([(2, 2, 1), (0, 3), (3,)]),
    seed=st.integers(0, 2**31),
)
def test_step_matches_loops(
    shape: TreeShape, batch: int, kind: str, own_vocab: bool, switches: set[str], aux: tuple[int, ...], seed: int
) -> None:
    seeded(str(seed))
    options: dict = {}
    if kind == "eagle3":
        options = {"aux_layers": aux, **dict.fromkeys(sorted(switches), True)}
        options |= {"draft_vocab_size": 11} if own_vocab else {}
    run, prompts = make_run(kind, shape, batch, **options)
    state = prefill(run, prompts, budgets=[40] * len(prompts))
    sequences = [[*prompt, first] for prompt, first in zip(prompts, state.root.tolist(), strict=True)]
    for _ in range(2):
        references = [Reference(run, sequence) for sequence in sequences]
        longest = max(map(len, sequences))
        tree = draft_tree(run, run.draft, state, longest)
        state = step(run, state, longest)
        for row, (reference, sequence) in enumerate(zip(references, sequences, strict=True)):
            wanted = tree_by_loops(reference.log_probs, sequence[-1], shape)
            assert_same_tree(tree, row, wanted)
            committed = walk_by_loops(wanted, reference.choose)
            assert state.tokens[row, : state.count[row]].tolist() == committed
            sequence += committed


def test_steps_commit_more_than_one_token() -> None:
    """The comparison above would prove little if the trees were never accepted."""
    run, prompts = make_run("eagle3", TreeShape(60, 2, 8), 4)
    state, accepted = prefill(run, prompts, budgets=[60] * len(prompts)), []
    for _ in range(12):
        state = step(run, state, 60)
        accepted += state.count.tolist()
    assert sum(accepted) > 1.3 * len(accepted)
