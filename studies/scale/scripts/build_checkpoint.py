"""Writes a random checkpoint of DeepSeek-V3's shapes, as large as wanted, one tensor in memory.

    python studies/scale/scripts/build_checkpoint.py --out DIR [--fp8] [--layers 5] [--experts 64]

Real: the widths of hidden states, experts and the dense MLP, the ranks and heads' sizes of latent
attention, 8 experts used, one shared expert. Smaller: layers, experts, heads (32 of 128) and the
vocabulary (8,192 of 129,280); the router has one group. `--fp8` stores projections as DeepSeek-V3
ships them: E4M3 codes, and an F32 factor per block of 128 x 128 in `<name>_scale_inv`.

A row is a piece of one pool of normal values, from a place and with a sign drawn by seed and tensor
name; matrices have a gain of one (the head: of three), so that states and logits keep their size.
A shard is written under another name, then renamed: running again writes the missing ones.
"""

import argparse
import json
import os
import zlib
from functools import cache, partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

BLOCK = 128
DTYPE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
_POOL = 1 << 22
_HEAD_GAIN = 3.0
_CODES_PER_DEVIATION = 100.0  # E4M3 ends at 448: 4.5 deviations


def config_of(
    *, layers, experts, experts_used=8, heads=32, hidden=7168, width=2048, dense_width=18432,
    vocabulary=8192, fp8=False,
):  # fmt: skip
    """`config.json`; one dense layer, the others route."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=dense_width,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_routed_experts=experts,
        num_experts_per_tok=experts_used,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=1536 if hidden >= 7168 else 256,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["DeepseekV3ForCausalLM"],
        dtype="bfloat16",
    )
    found = json.loads(config.to_json_string(use_diff=False))
    found["num_nextn_predict_layers"] = 0
    if fp8:
        found["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
    return found


def tensors_of(config):
    """Name to dtype and shape of every tensor, in the order of the files."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    value, n = config["v_head_dim"], config["n_routed_experts"]
    fp8 = "quantization_config" in config
    found = {}

    def plain(name, *shape, dtype="BF16"):
        found[name] = dtype, shape

    def matrix(name, rows, columns):
        if not fp8:
            return plain(name, rows, columns)
        plain(name, rows, columns, dtype="F8_E4M3")
        plain(f"{name}_scale_inv", -(-rows // BLOCK), -(-columns // BLOCK), dtype="F32")

    def mlp(at, width):
        matrix(f"{at}.gate_proj.weight", width, hidden)
        matrix(f"{at}.up_proj.weight", width, hidden)
        matrix(f"{at}.down_proj.weight", hidden, width)

    plain("model.embed_tokens.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        attention = f"{at}.self_attn"
        plain(f"{at}.input_layernorm.weight", hidden)
        matrix(f"{attention}.q_a_proj.weight", q_rank, hidden)
        plain(f"{attention}.q_a_layernorm.weight", q_rank)
        matrix(f"{attention}.q_b_proj.weight", heads * (nope + rope), q_rank)
        matrix(f"{attention}.kv_a_proj_with_mqa.weight", kv_rank + rope, hidden)
        plain(f"{attention}.kv_a_layernorm.weight", kv_rank)
        matrix(f"{attention}.kv_b_proj.weight", heads * (nope + value), kv_rank)
        matrix(f"{attention}.o_proj.weight", hidden, heads * value)
        plain(f"{at}.post_attention_layernorm.weight", hidden)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        plain(f"{at}.mlp.gate.weight", n, hidden)
        plain(f"{at}.mlp.gate.e_score_correction_bias", n, dtype="F32")
        mlp(f"{at}.mlp.shared_experts", config["moe_intermediate_size"])
        for expert in range(n):
            mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
    plain("model.norm.weight", hidden)
    plain("lm_head.weight", config["vocab_size"], hidden)
    return found


def bfloat16(values):
    """Bits of float32 values, rounded to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@cache
def _pool(seed, kind, deviation):
    values = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
    if kind == "BF16":
        return bfloat16(values * deviation)
    import torch

    scaled = torch.from_numpy(np.clip(values * _CODES_PER_DEVIATION, -448, 448))
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def values_of(name, dtype, shape, *, seed):
    """The bits of one tensor."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("_scale_inv"):
        columns = shape[1] * BLOCK  # but for a partial block
        spread = np.exp(0.2 * rng.standard_normal(shape))
        return (spread / _CODES_PER_DEVIATION / columns**0.5).astype(np.float32)
    if name.endswith("e_score_correction_bias"):
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    if len(shape) == 1:
        return bfloat16(1 + 0.1 * rng.standard_normal(shape))
    gain = {"lm_head.weight": _HEAD_GAIN, "model.embed_tokens.weight": shape[1] ** 0.5}
    pool = _pool(seed, dtype, gain.get(name, 1.0) / shape[1] ** 0.5 if dtype == "BF16" else 1.0)
    rows, columns = shape
    places = rng.integers(0, len(pool) - columns, rows)
    found = sliding_window_view(pool, columns)[places]
    signs = rng.integers(0, 2, (rows, 1), dtype=pool.dtype)
    found ^= signs << (8 * pool.itemsize - 1)
    return found


def shards_of(tensors, shard_bytes):
    """The tensors in files of about this size."""
    shards, size = [{}], 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * DTYPE_BYTES[dtype]
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = dtype, shape
        size += nbytes
    return shards


def write_shard(path, tensors, *, seed):
    """One file, unless it is there; see `safetensors`' format."""
    if path.exists():
        return
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        stop = end + prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
        end = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".part")
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            file.write(values_of(name, dtype, shape, seed=seed).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def build(out, *, seed=0, shard_bytes=512 << 20, show=lambda text: None, **dimensions):
    """Writes a checkpoint directory, or what it lacks; its bytes."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = config_of(**dimensions)
    text = json.dumps(config, indent=1, sort_keys=True)
    known = out / "config.json"
    if known.exists() and known.read_text() != text:
        raise SystemExit(f"{out}: holds a checkpoint of other dimensions; remove it")
    known.write_text(text)
    shards = shards_of(tensors_of(config), shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        write_shard(out / name, tensors, seed=seed)
        show(name)
    index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(prod(s) * DTYPE_BYTES[d] for shard in shards for d, s in shard.values())
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    )
    return total


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=512 << 20)
    for name, default in (
        ("layers", 5), ("experts", 64), ("experts-used", 8), ("heads", 32), ("hidden", 7168),
        ("width", 2048), ("dense-width", 18432), ("vocabulary", 8192),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    total = build(**vars(parser.parse_args()), show=partial(print, flush=True))
    print(f"{total:,} bytes of tensors")


if __name__ == "__main__":
    main()
