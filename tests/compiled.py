"""Compiles kernels for GPUs that need not be there: ``python compiled.py MAJOR MINOR SHARED_BYTES`` prints, as JSON, the
shared memory each launch takes. A process of its own, because the tests' own has Triton's interpreter."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eagle.model.triton_kernels.attention_config import PATH_HEADS, decode_config, prefill_config
from eagle.model.triton_kernels.attention_path import path_kernel
from eagle.model.triton_kernels.attention_prefill import _prefill_kernel
from eagle.model.triton_kernels.attention_prefix import prefix_kernel
from eagle.model.triton_kernels.linear_config import BLOCK_M, DeviceTraits, rule
from eagle.model.triton_kernels.linear_kernels import product_kernel

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}
HEADS = ((32, 8, 128), (8, 4, 256))
"""Query heads, KV heads, head size."""
PRODUCTS = ((6144, 4096), (4096, 14336), (3072, 576))
"""N and K."""


def shared(
    kernel: Any, capability: tuple[int, int], types: dict[str, str], constants: dict[str, Any], **options
) -> int:
    """Bytes of shared memory. types: of the arguments that are no int32; pointers are taken to be aligned."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    even = [name for name in names if signature[name][0] == "*" or name in ("k_s", "v_s", "q_h", "n", "k", "x_stride")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in even if signature[name] != "constexpr"}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(ASTSource(kernel, signature, fixed, aligned), target=target, options=options).metadata.shared


def attention(capability: tuple[int, int], dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> dict[str, int]:
    """Of the three kernels, for a tree of 60 nodes and for prompts."""
    group, block = heads // kv_heads, triton.next_power_of_2(size)
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{NAMES[dtype]}") | {"kv_len": "*i64", "words": "*i64"}
    types |= {"stats": "*fp32", "scale": "fp32", "softcap": "fp32"}
    sizes = {"GROUP": group, "SIZE": size, "V_SIZE": size, "BLOCK_D": block, "BLOCK_DV": block}
    sizes |= {"HAS_WINDOW": True, "HAS_SOFTCAP": False}
    prefill = prefill_config(size, size, dtype, capability)
    tiles = {"HEADS": heads, "BLOCK_M": prefill.block_m, "BLOCK_N": prefill.block_n}
    found = {
        "prompts": shared(
            _prefill_kernel, capability, types, sizes | tiles, num_warps=prefill.warps, num_stages=prefill.stages
        )
    }
    decode = decode_config(60 * group, group, kv_heads, size, size, dtype, capability)
    types["states"] = f"*{NAMES[dtype] if decode.narrow_states else 'fp32'}"
    sizes |= {"KV_HEADS": kv_heads, "WORDS": 1, "HAS_TREE": True, "SPLITS": decode.splits, "TAIL": decode.tail}
    sizes |= {"BLOCK_N": decode.block_n, "PDL": decode.overlap}
    copiers = ("k_copier", "v_copier")
    block_type = f"tensordesc<{NAMES[dtype]}[{decode.block_n}, {size}]>"
    found["prefix"] = shared(
        prefix_kernel,
        capability,
        types | (dict.fromkeys(copiers, block_type) if decode.copier else {}),
        sizes | {"BLOCK_M": decode.prefix_m} | ({} if decode.copier else dict.fromkeys(copiers)),
        num_warps=decode.prefix_warps,
        num_stages=decode.stages,
        maxnreg=decode.prefix_registers,
    )
    rows = {"HEADS": PATH_HEADS, "MERGE_HEADS": min(PATH_HEADS, triton.next_power_of_2(group))}
    found["path"] = shared(path_kernel, capability, types, sizes | rows, num_warps=decode.path_warps, num_stages=1)
    return found


def product(traits: DeviceTraits, n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """Of the linear that the rule chooses, loading without the copy engine."""
    config = rule(n, k, dtype, weight_dtype, traits)
    types = dict.fromkeys(("x", "out"), f"*{NAMES[dtype]}") | {"weight": f"*{NAMES[weight_dtype]}", "eps": "fp32"}
    absent = dict.fromkeys(("x_copier", "copier", "bias", "residual", "norm_weight", "partial"))
    if weight_dtype.itemsize == 1:
        types["scale"] = "*fp32"
    else:
        absent["scale"] = None
    tiles = {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN_K": k % config.block_k == 0,
    }
    flags = {"SWAP": config.swap, "SWIGLU": False, "HOPPER": traits.capability >= (9, 0), "LINES": config.prefetch}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return shared(product_kernel, traits.capability, types, absent | tiles | flags, **options)


def main(major: int, minor: int, limit: int) -> None:
    traits = DeviceTraits("some GPU", (major, minor), 108, limit)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for heads in HEADS:
            for name, taken in attention(traits.capability, dtype, *heads).items():
                found[f"attention, {name}, {heads}, {NAMES[dtype]}"] = taken
        weights = [dtype] if dtype == torch.float32 else [dtype, torch.int8]
        weights += [torch.float8_e4m3fn] if dtype != torch.float32 and traits.capability >= (8, 9) else []
        for weight_dtype in weights:
            for sizes in PRODUCTS:
                found[f"product, {sizes}, {NAMES[weight_dtype]}"] = product(traits, *sizes, dtype, weight_dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
