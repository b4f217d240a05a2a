import pytest
import torch
from train_case import tiny_model

from eagle.errors import UnsupportedModelError
from eagle.train.attention import Packing
from eagle.train.target import Target, check_decode


@pytest.mark.parametrize("layers", [2, 7])
def test_packed_features_equal_each_document_alone(layers):
    lengths = [9, 1, 14]
    tokens = torch.randint(2, 258, (sum(lengths),), generator=torch.Generator().manual_seed(layers))
    positions = torch.cat([torch.arange(n) for n in lengths])
    target = Target(tiny_model(layers, seed=layers))
    features, hidden = target.features(tokens, positions, Packing.of(lengths, "cpu"))
    assert target.aux_layers == (2, layers // 2, max(0, layers - 3))

    plain = tiny_model(layers, seed=layers)
    inputs: list[torch.Tensor] = []
    for module in (*plain.model.layers, plain.model.norm):
        module.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    begin = 0
    for length in lengths:
        inputs.clear()
        with torch.no_grad():
            last = plain.model(tokens[None, begin : begin + length]).last_hidden_state[0]
        expected = torch.cat([inputs[i][0] for i in target.aux_layers], dim=-1)
        torch.testing.assert_close(features[begin : begin + length], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden[begin : begin + length], last, rtol=1e-4, atol=1e-5)
        begin += length


def test_models_of_another_layout_are_refused():
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
        Target(model)
    with pytest.raises(UnsupportedModelError, match="laid out like Llama"):
        Target(torch.nn.Linear(2, 2))


def test_the_decoding_check_reports_a_backend_that_is_not_there():
    assert "Error" in check_decode(4, 2, 16, torch.device("cpu"))
