"""From a located pair of folders or hub ids to a target, a tokenizer and a draft head."""

from __future__ import annotations

import difflib
import inspect
import os
import pickle
import re
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eagle.errors import CheckpointError, EagleError, InvalidInputError, ModelNotFoundError, UnsupportedModelError
from eagle.model.checkpoint_files import listed, read_tensors
from eagle.model.checkpoints import DraftState, default_draft_config, load_draft, random_draft
from eagle.model.draft_config import TargetSpec
from eagle.model.drafts import DraftModel
from eagle.model.hub import ensure_local
from eagle.model.locate import RANDOM_DRAFT, ModelLocation
from eagle.model.memory import check_fits, check_memory
from eagle.model.target_support import check_config
from eagle.model.widened import SmallPair, build_in_memory, part_bytes, shape_of


def check_settings(hf_kwargs: dict[str, Any], own: Iterable[inspect.Parameter]) -> None:
    """Refuse a keyword meant for transformers that is nearly one of our ``own``, or nearly ``device_map``, and a dtype or a
    device that can't be, before anything is read. Raises InvalidInputError."""
    ours = [parameter.name for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for name, value in hf_kwargs.items():
        close = ["device_map"] if name == "device" else difflib.get_close_matches(name, ours, n=1, cutoff=0.8)
        if close:
            raise InvalidInputError(f"from_pretrained takes no {name!r}; did you mean {close[0]}?")
        if name in ("dtype", "torch_dtype") and value not in (None, "auto") and not isinstance(value, dict):
            dtype = _as_dtype(value)
            if dtype is None or not dtype.is_floating_point:
                raise InvalidInputError(f"{name} is {value!r}; expected a floating-point dtype, its name or 'auto'")
    wanted = hf_kwargs.get("device_map")
    if isinstance(wanted, bool) or (isinstance(wanted, int) and wanted < 0):
        raise InvalidInputError(f"device_map is {wanted!r}; expected a device, its number, a map of modules or 'auto'")
    device = _one_device(wanted)
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            f"device_map is {wanted!r}, but PyTorch sees no CUDA device here; leave it out for the CPU"
        )


def load_pair(
    location: ModelLocation, use_eagle3: bool | None = None, hf_kwargs: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, DraftModel, list[str]]:
    """Target and head of a location that names both, and the conventions the head's loading resolved, a line each.

    A pair that is to be built in memory is: dtype, device_map (one device) and attn_implementation are then the options,
    with `load_target`'s defaults. Raises what `load_target` and `load_draft_model` raise.
    """
    hf_kwargs = hf_kwargs or {}
    if location.widen is None:
        base_model = load_target(location.base, hf_kwargs)
        return base_model, *load_draft_model(location.draft, base_model, use_eagle3, hf_kwargs)
    options = _load_options(hf_kwargs)
    device, dtype = _one_device(options.pop("device_map", None)), _as_dtype(options.pop("dtype")) or torch.bfloat16
    attention = options.pop("attn_implementation", None)
    if options or device is None:
        odd = listed(sorted(options)) if options else f"device_map={hf_kwargs['device_map']!r}"
        raise InvalidInputError(f"in_memory=True takes dtype, one device as device_map, attn_implementation, not {odd}")
    name = location.preset.name
    base_model, state = build_in_memory(name, location.widen, device=device, dtype=dtype, attn_implementation=attention)
    if location.draft == str(location.widen.head):
        if use_eagle3 is False:
            raise CheckpointError(f"the head of {name} is an EAGLE-3 head, but use_eagle3=False was given")
        return base_model, build_draft(state), state.notes
    return base_model, *load_draft_model(location.draft, base_model, use_eagle3, hf_kwargs)


def check_widened(name: str, small: SmallPair, hf_kwargs: dict[str, Any]) -> None:
    """Refuse a widened model whose weights can't fit the one device it is to be loaded on, before it is built on disk.
    Raises OutOfMemoryError."""
    options = _load_options(hf_kwargs)
    device = _one_device(options.get("device_map"))
    if device is None or "quantization_config" in options:
        return
    dtype = _as_dtype(options["dtype"]) or torch.bfloat16  # as built
    parts = small.target_parts(small.widening(shape_of(name), "cpu", dtype))
    check_fits(sum(part_bytes(part, dtype) for part in parts), device, f"the weights of {name}", dtype)


def load_target(source: str, hf_kwargs: dict[str, Any]) -> PreTrainedModel:
    """The causal LM of a folder or hub id, by transformers' own classes.

    Without ``dtype`` or ``device_map``: float32 on a CPU, the checkpoint's own dtype on the first GPU. Weights that can't
    fit one device are refused before they are read (OutOfMemoryError).
    """
    # A mismatch is then reported like a missing tensor, by name and with both shapes, and refused below.
    options = {"ignore_mismatched_sizes": True, **_load_options(hf_kwargs)}
    folder = ensure_local(source, "target model", **_hub_options(hf_kwargs))
    device = _one_device(options.get("device_map"))
    # What a quantisation on loading or a GGUF file makes of the weights is not known beforehand.
    if device is not None and not {"quantization_config", "gguf_file"} & options.keys():
        check_memory(folder, _as_dtype(options["dtype"]), device)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {folder} are damaged ({error}); fetch or copy them again") from error
    except (torch.OutOfMemoryError, EagleError):
        raise
    # The configuration is a stranger's, and transformers computes with it before it judges it.
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        EOFError,
        ImportError,
        StrictDataclassError,
        pickle.UnpicklingError,
    ) as error:
        unknown = (
            re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
        )
        if unknown is not None and unknown[1] in hf_kwargs:
            raise InvalidInputError(
                f"from_pretrained takes no {unknown[1]!r}, and nor does the model; leave it out"
            ) from error
        if "Unrecognized configuration class" in str(error):
            kind = re.search(r"configuration class <class '[\w.]*\.(\w+)'>", str(error))
            raise UnsupportedModelError(
                f"{folder} holds {kind[1] if kind else 'a model'}, which transformers knows no decoder-only causal LM for; "
                "use a model that has one"
            ) from error
        if not any(folder.glob("*.safetensors")):
            read_tensors(folder)  # says in one line which pickle is damaged or wants to run code
        raise ModelNotFoundError(
            f"transformers could not load a causal LM from {folder}: {_first_line(error)}; expected a Hugging Face model "
            "folder whose weights fit its config.json"
        ) from error
    missing, mismatched = sorted(info["missing_keys"]), sorted(str(key) for key in info["mismatched_keys"])
    if missing or mismatched:
        faults = [f"lack {listed(missing)}"] if missing else []
        faults += [f"mismatch in {listed(mismatched)}"] if mismatched else []
        raise CheckpointError(
            f"the weights in {folder} {' and '.join(faults)}; transformers would fill in random numbers: "
            "fetch or copy them again"
        )
    return model


def ignored_settings(model: PreTrainedModel) -> list[str]:
    """Logits processors the model's generation config asks for, which change transformers' own greedy output too and
    are not applied here; each as ``name=value``."""
    config = model.generation_config
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0}
    neutral |= dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"))
    neutral |= dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens"))
    given = {name: getattr(config, name, None) for name in neutral}
    return [f"{name}={value}" for name, value in given.items() if value and value != neutral[name]]


def load_tokenizer(source: str, hf_kwargs: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model, or None where the folder holds none."""
    folder = ensure_local(source, "target model", **_hub_options(hf_kwargs))
    if not any(name.startswith("token") for name in os.listdir(folder)):
        return None
    trust = {"trust_remote_code": True} if hf_kwargs.get("trust_remote_code") else {}
    try:
        return AutoTokenizer.from_pretrained(folder, **trust)
    except (OSError, ValueError, KeyError) as error:
        reason = _first_line(error).rstrip(",")
        if not (folder / "tokenizer.json").is_file():
            reason = f"there is no tokenizer.json ({reason})"
        raise CheckpointError(
            f"the tokenizer in {folder} can't be read: {reason}; fetch or copy its files again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return " ".join(lines[:2])
    return lines[0] if lines else type(error).__name__


def load_draft_model(
    source: str, base_model: PreTrainedModel, use_eagle3: bool | None = None, hf_kwargs: dict[str, Any] | None = None
) -> tuple[DraftModel, list[str]]:
    """The head for a target, and the conventions its loading resolved, a line each."""
    config = base_model.config.get_text_config(decoder=True)
    check_config(base_model, config)  # before a head is measured against what could not be driven anyway
    output = base_model.get_output_embeddings()
    vocab = output.weight.shape[0] if output is not None and output.weight.dim() == 2 else config.vocab_size
    spec = TargetSpec(config.hidden_size, vocab, config.num_hidden_layers)
    if source == RANDOM_DRAFT:
        return build_draft(random_head(config, spec, use_eagle3)), ["the head is untrained: drafts are guesses"]
    eps = getattr(config, "rms_norm_eps", None)
    options = {name: value for name, value in _hub_options(hf_kwargs or {}).items() if name != "revision"}
    state = load_draft(ensure_local(source, "draft head", **options), spec, use_eagle3=use_eagle3, target_rms_eps=eps)
    return build_draft(state), state.notes


def random_head(config: Any, spec: TargetSpec, use_eagle3: bool | None) -> DraftState:
    """A head made from nothing, shaped like one layer of the target."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    draft = default_draft_config(
        spec,
        kind="eagle1" if use_eagle3 is False else "eagle3",
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim + head_dim % 2,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    )
    return random_draft(draft, seed=0)


def build_draft(state: DraftState) -> DraftModel:
    """The module of a canonical state. Every tensor finds its place or loading fails."""
    with torch.device("meta"):
        model = DraftModel(
            state.config,
            own_lm_head="lm_head.weight" in state.tensors,
            own_embedding="embed_tokens.weight" in state.tensors,
        )
    model.load_state_dict(state.tensors, strict=True, assign=True)
    return model.requires_grad_(False)


def _load_options(hf_kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformers' keyword arguments with the defaults for this machine."""
    options = dict(hf_kwargs)
    if "torch_dtype" in options:  # the reference's spelling; transformers 5 says dtype
        options["dtype"] = options.pop("torch_dtype")
    on_gpu = torch.cuda.is_available()
    options.setdefault("dtype", "auto" if on_gpu else torch.float32)
    if on_gpu:
        options.setdefault("device_map", {"": 0})
    return options


def _one_device(device_map: Any) -> torch.device | None:
    """The device that a ``device_map`` puts the whole model on; None where it may take several."""
    if isinstance(device_map, dict):
        device_map = device_map[""] if set(device_map) == {""} else "auto"
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):  # auto, balanced, …: transformers judges them
        return None


def _as_dtype(dtype: Any) -> torch.dtype | None:
    """A dtype from its name; None for the checkpoint's own ("auto") and for what transformers will refuse."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return found if isinstance(found, torch.dtype) else None


def _hub_options(hf_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What of transformers' keyword arguments concerns fetching a hub id."""
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")
    return {name: hf_kwargs[name] for name in names if name in hf_kwargs}
