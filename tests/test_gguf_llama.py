import json

import numpy as np
import pytest
import tiny_gguf
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle.errors import CheckpointError
from eagle.model.gguf_llama import convert_gguf_llama


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def converted(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    weights = tiny_gguf.write_gguf(root / "tiny.gguf", tied=request.param)
    (root / "hf").mkdir()
    convert_gguf_llama(root / "tiny.gguf", root / "hf")
    return root, weights


def dequantise_q4_1(raw: np.ndarray, rows: int) -> np.ndarray:
    """Blocks of 32 weights: float16 scale, float16 minimum, 16 bytes; low nibbles first (llama.cpp's ggml-quants)."""
    out = []
    for block in np.frombuffer(raw.tobytes(), np.uint8).reshape(-1, 20):
        scale, minimum = np.frombuffer(block[:4].tobytes(), np.float16).astype(np.float32)
        nibbles = [int(byte) & 15 for byte in block[4:]] + [int(byte) >> 4 for byte in block[4:]]
        out.append(np.array(nibbles, np.float32) * scale + minimum)
    return np.concatenate(out).reshape(rows, -1)


def undo_interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    order = tiny_gguf.interleave(np.arange(len(weight))[:, None], heads)[:, 0]
    out = np.empty_like(weight)
    out[order] = weight
    return out


def test_tensors_equal_an_independent_dequantisation(converted):
    root, original = converted
    found = load_file(root / "hf" / "model.safetensors")
    stored = {tensor.name: tensor for tensor in GGUFReader(root / "tiny.gguf").tensors}
    assert found.keys() == original.keys()
    for name, weight in original.items():
        raw = stored[tiny_gguf.gguf_name(name)].data
        if weight.ndim == 1:
            expected = weight
        else:
            expected = dequantise_q4_1(raw, len(weight))
            if "q_proj" in name or "k_proj" in name:
                expected = undo_interleave(expected, tiny_gguf.HEADS if "q_proj" in name else tiny_gguf.KV_HEADS)
            expected = torch.from_numpy(expected)
            # Four bits keep about a twentieth of the size of a random weight: near the original, row by row.
            error = (expected - weight).norm(dim=1) / weight.norm(dim=1)
            assert error.max() < 0.2, name
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], expected.to(torch.bfloat16)), name


def test_logits_equal_those_of_transformers_own_conversion(converted):
    root, _ = converted
    ours = AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(root, gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        ids = torch.randint(len(tiny_gguf.TOKENS), (3, 37))
        a, b = ours(ids).logits, theirs(ids).logits
    assert (a - b).norm() <= 1e-6 * b.norm()
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings


def test_config_is_plain_and_bfloat16(converted):
    root, _ = converted
    config = json.loads((root / "hf" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(root / "hf")
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 20000.0
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


def test_tokenizer_splits_digits_and_keeps_specials_and_template(converted):
    root, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(root / "hf")
    assert tokenizer.tokenize("hello  1234<|im_end|>") == ["hello", "ĠĠ", "1", "2", "3", "4", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == tiny_gguf.CONTEXT
    text = "Grüße, 三 hello\n\n 12 the end 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"


def test_progress_rises_to_one(tmp_path):
    tiny_gguf.write_gguf(tmp_path / "tiny.gguf")
    seen = []
    convert_gguf_llama(tmp_path / "tiny.gguf", tmp_path, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_what_is_not_a_plain_llama_is_refused(tmp_path):
    (tmp_path / "noise.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(CheckpointError, match=r"noise\.gguf.*GGUF"):
        convert_gguf_llama(tmp_path / "noise.gguf", tmp_path)
    tiny_gguf.write_gguf(tmp_path / "other.gguf", pre="qwen2")
    with pytest.raises(CheckpointError, match="gpt2/qwen2"):
        convert_gguf_llama(tmp_path / "other.gguf", tmp_path)
