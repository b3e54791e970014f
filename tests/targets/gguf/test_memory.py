"""What is predicted from `config.json`, against what llama.cpp allocates for a file of zeros."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from allocator.checkpoint.outline import planned_inventory
from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.errors import TargetError, VerifyError
from allocator.export.gguf.files import write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.formats import FORMATS
from allocator.targets import GGUF
from allocator.targets.gguf.graph import Graph
from allocator.targets.gguf.memory import (
    compute_bytes,
    kv_cache_bytes,
    kv_parts,
    kv_read_bytes,
    output_bytes,
    overhead_bytes,
    padded_context,
    rotation,
)
from allocator.testing.tensors import ZeroTensors

CONFIGS = Path(__file__).parents[2] / "data/configs"
COMMON = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 384,
    "vocab_size": 3000,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "norm_topk_prob": True,
}
GROUPED = COMMON | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 16,
}
LATENT = COMMON | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 64,
    "v_head_dim": 160,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
MIXTRAL = COMMON | {
    "model_type": "mixtral",
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
WINDOWED = COMMON | {
    "model_type": "gpt_oss",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 16,
    "sliding_window": 128,
}
NARROW = {  # so that the router needs most
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
MODELS = {  # config, retained experts, format
    "grouped": (GROUPED | {"vocab_size": 20000}, 16, "Q8_0"),
    "grouped, heads of 64": (GROUPED | {"head_dim": 64, "num_key_value_heads": 4}, 12, "F16"),
    "grouped, heads of 96": (GROUPED | {"head_dim": 96, "vocab_size": 300}, 16, "Q8_0"),
    "grouped, one expert": (GROUPED | {"num_experts_per_tok": 1, "vocab_size": 64}, 16, "Q5_0"),
    "grouped, many experts": (GROUPED | {"num_experts": 64, "num_experts_per_tok": 16}, 48, "Q8_0"),
    "latent": (LATENT, 16, "Q8_0"),
    "latent, router groups": (
        LATENT | NARROW | {"n_routed_experts": 128, "n_group": 8, "topk_group": 4},
        96,
        "F16",
    ),
    "latent, tied, wide": (
        LATENT | {"num_attention_heads": 24, "vocab_size": 128, "tie_word_embeddings": True},
        10,
        "Q5_0",
    ),
    "latent, dense layers": (
        LATENT | {"first_k_dense_replace": 3, "intermediate_size": 6144, "vocab_size": 500},
        16,
        "Q8_0",
    ),
    "latent, plain gates": (
        LATENT | {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_shared_experts": 2},
        16,
        "Q8_0",
    ),
    "mixtral": (MIXTRAL, 8, "Q8_0"),
    "mixtral, heads of 128": (MIXTRAL | {"head_dim": 128, "vocab_size": 20000}, 5, "Q4_0"),
    "mixtral, heads of 96": (MIXTRAL | {"head_dim": 96, "intermediate_size": 64}, 8, "F16"),
    "windows": (WINDOWED, 16, "Q8_0"),
    "windows, wide": (WINDOWED | {"sliding_window": 1000, "intermediate_size": 320}, 12, "Q4_0"),
    "windows, heads of 32": (WINDOWED | {"head_dim": 32, "vocab_size": 64}, 16, "Q8_0"),
    "windows, wide attention": (
        WINDOWED | {"num_key_value_heads": 8, "head_dim": 256, "intermediate_size": 32},
        16,
        "Q8_0",
    ),
    "windows, many experts": (
        WINDOWED
        | NARROW
        | {"num_key_value_heads": 1, "num_local_experts": 128, "num_experts_per_tok": 1},
        128,
        "Q8_0",
    ),
    "windows, narrow": (
        WINDOWED | NARROW | {"num_key_value_heads": 1, "hidden_size": 32},
        16,
        "Q8_0",
    ),
    "windows, odd layers": (WINDOWED | {"num_hidden_layers": 3, "vocab_size": 20000}, 9, "Q5_0"),
}
CASES = [  # model, kv_format, context, sequences, micro_batch
    ("grouped", "f16", 256, 1, 256),
    ("grouped", "q8_0", 2048, 1, 512),
    ("grouped", "q8_0/q4_0", 4096, 2, 128),
    ("grouped", "f16/q8_0", 300, 3, 64),
    ("grouped, heads of 64", "q4_0", 700, 1, 512),
    ("grouped, heads of 64", "q4_0/f16", 512, 4, 2),
    ("grouped, heads of 96", "q8_0", 1000, 2, 100),
    ("grouped, one expert", "q8_0", 32768, 1, 32),
    ("grouped, many experts", "q4_0", 1024, 1, 512),
    ("latent", "f16", 256, 1, 256),
    ("latent", "q8_0", 4096, 1, 512),
    ("latent", "q4_0", 100, 5, 77),
    ("latent, router groups", "q8_0", 600, 2, 200),
    ("latent, router groups", "f16", 512, 1, 1),
    ("latent, tied, wide", "q4_0", 8192, 2, 512),
    ("latent, tied, wide", "f16", 1024, 3, 2),
    ("latent, dense layers", "q8_0/q8_0", 512, 1, 512),
    ("latent, plain gates", "q4_0", 2048, 4, 64),
    ("mixtral", "f16", 256, 1, 256),
    ("mixtral", "q8_0/q4_0", 4096, 2, 128),
    ("mixtral, heads of 128", "q4_0", 700, 3, 64),
    ("mixtral, heads of 128", "q8_0", 2048, 1, 512),
    ("mixtral, heads of 96", "q8_0", 1000, 2, 100),
    ("mixtral, heads of 96", "f16", 512, 4, 2),
    ("windows", "f16", 256, 1, 256),
    ("windows", "q8_0", 2048, 1, 512),
    ("windows", "q8_0/q4_0", 4096, 2, 128),
    ("windows", "f16/q8_0", 300, 3, 64),
    ("windows, wide", "q4_0", 700, 1, 512),
    ("windows, wide", "f16", 4096, 3, 77),
    ("windows, heads of 32", "q8_0", 32768, 1, 32),
    ("windows, odd layers", "q4_0", 1024, 4, 2),
    ("windows, wide attention", "q8_0/f16", 256, 1, 32),
    ("windows, many experts", "q8_0", 256, 2, 256),
    ("windows, narrow", "f16", 256, 1, 256),
    ("windows, odd layers", "f16", 5000, 1, 512),
]


def attention(at, c):
    """Name to shape, as transformers names them."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    if "kv_lora_rank" not in c:
        head, kv = c["head_dim"], c["num_key_value_heads"]
        return {
            f"{at}.q_proj.weight": (heads * head, hidden),
            f"{at}.k_proj.weight": (kv * head, hidden),
            f"{at}.v_proj.weight": (kv * head, hidden),
            f"{at}.o_proj.weight": (hidden, heads * head),
            f"{at}.q_norm.weight": (head,),
            f"{at}.k_norm.weight": (head,),
        }
    rank, nope, rope = (c[k] for k in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"))
    return {
        f"{at}.q_a_proj.weight": (c["q_lora_rank"], hidden),
        f"{at}.q_a_layernorm.weight": (c["q_lora_rank"],),
        f"{at}.q_b_proj.weight": (heads * (nope + rope), c["q_lora_rank"]),
        f"{at}.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        f"{at}.kv_a_layernorm.weight": (rank,),
        f"{at}.kv_b_proj.weight": (heads * (nope + c["v_head_dim"]), rank),
        f"{at}.o_proj.weight": (hidden, heads * c["v_head_dim"]),
    }


def mlp(at, hidden, inner):
    return {
        f"{at}.gate_proj.weight": (inner, hidden),
        f"{at}.up_proj.weight": (inner, hidden),
        f"{at}.down_proj.weight": (hidden, inner),
    }


def shapes(c):
    hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
    found = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not c.get("tie_word_embeddings"):
        found["lm_head.weight"] = (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {f"{at}.{k}_layernorm.weight": (hidden,) for k in ("input", "post_attention")}
        found |= attention(f"{at}.self_attn", c)
        if layer < c.get("first_k_dense_replace", 0):
            found |= mlp(f"{at}.mlp", hidden, c["intermediate_size"])
            continue
        n = c.get("num_experts") or c["n_routed_experts"]
        found[f"{at}.mlp.gate.weight"] = (n, hidden)
        for expert in range(n):
            found |= mlp(f"{at}.mlp.experts.{expert}", hidden, inner)
        if "kv_lora_rank" in c:
            found[f"{at}.mlp.gate.e_score_correction_bias"] = (n,)
            found |= mlp(f"{at}.mlp.shared_experts", hidden, inner * c["n_shared_experts"])
    return found


def write(folder, make, config, n_experts, fmt):
    made = make.zeros(folder, tensors=shapes(config), **dict.fromkeys(["num_experts"]) | config)
    inventory = read_inventory(made)
    layout = GGUF.layout(inventory)
    size = inventory.n_experts // inventory.expert_groups
    kept = n_experts // inventory.expert_groups
    retained = tuple(i for i in range(inventory.n_experts) if i % size < kept)
    allocation = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, retained),
        formats=dict.fromkeys(layout.groups, fmt),
        experts_used=inventory.experts_used,
    )
    write_gguf(folder / "model.gguf", layout, allocation, ZeroTensors(layout, allocation))
    n = len(retained)
    sizes = [FORMATS[fmt].nbytes(group.shape_with(n)) for group in layout.groups.values()]
    sizes += [kept.nbytes(n) for kept in layout.full_precision]
    return SimpleNamespace(
        path=folder / "model.gguf",
        inventory=inventory,
        experts={"n_experts": n, "experts_used": inventory.experts_used},
        # each tensor starts at a multiple of 32 bytes; what is mapped ends with the last one
        weights=sum(-(-nbytes // 32) * 32 for nbytes in sizes[:-1]) + sizes[-1],
    )


def hparams(writer, c, n_experts):
    """What llama.cpp's loaders of `llama` and `gpt-oss` ask for, and no tokenizer."""
    writer.add_vocab_size(c["vocab_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(c["num_experts_per_tok"])
    if c.get("sliding_window"):
        writer.add_expert_feed_forward_length(c["intermediate_size"])
        writer.add_sliding_window(c["sliding_window"])
    writer.add_tokenizer_model("no_vocab")


def write_planned(folder, config, n_experts, fmt):
    """A file of a family that we only plan, by gguf-py; its zeros are a hole."""
    path, inventory = folder / "model.gguf", planned_inventory(config)
    layout = GGUF.layout(inventory)
    writer = GGUFWriter(path, inventory.family.for_gguf().architecture)
    hparams(writer, config, n_experts)
    sizes = []
    for group in layout.groups.values():
        block = group.source_format or FORMATS[fmt]
        *outer, inner = group.shape_with(n_experts)
        sizes.append(block.nbytes((*outer, inner)))
        rows = (*outer, inner // block.block * block.block_bytes)
        kind = GGMLQuantizationType[block.name]
        writer.add_tensor_info(group.stored_as, rows, np.dtype(np.uint8), sizes[-1], raw_dtype=kind)
    for kept in layout.full_precision:
        sizes.append(kept.nbytes(n_experts))
        shape = kept.shape_with(n_experts)
        writer.add_tensor_info(kept.stored_as, shape, np.dtype(np.float32), sizes[-1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    start = writer.fout[0].tell()
    writer.close()
    ends = sum(-(-nbytes // 32) * 32 for nbytes in (start, *sizes))
    os.truncate(path, ends)
    return SimpleNamespace(
        path=path,
        inventory=inventory,
        experts={"n_experts": n_experts, "experts_used": inventory.experts_used},
        weights=sum(-(-nbytes // 32) * 32 for nbytes in sizes[:-1]) + sizes[-1],
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory, make):
    """By name, each made when it is first asked for."""
    made = {}

    def model(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("memory")
            config, n_experts, fmt = MODELS[name]
            if config["model_type"] in ("mixtral", "gpt_oss"):
                made[name] = write_planned(folder, config, n_experts, fmt)
            else:
                made[name] = write(folder, make, config, n_experts, fmt)
        return made[name]

    return model


def logged(buffers, kind):
    """MiB of a kind of buffer, as llama.cpp prints them."""
    lines = [line for line in buffers.log if f"{kind} buffer size" in line]
    return sum(float(line.split("=")[1].split()[0]) for line in lines)


@pytest.mark.parametrize(("name", "kv_format", "context", "sequences", "micro_batch"), CASES)
def test_llama_cpp_allocates_what_is_predicted(
    models, name, kv_format, context, sequences, micro_batch
):
    model = models(name)
    held = {"kv_format": kv_format, "context": context, "sequences": sequences}
    with LlamaCpp(model.path, micro_batch=micro_batch, **held) as runtime:
        found = runtime.buffers()
    assert found.weights == model.weights
    assert kv_cache_bytes(model.inventory, micro_batch=micro_batch, **held) == found.kv_cache
    compute = compute_bytes(model.inventory, micro_batch=micro_batch, **held, **model.experts)
    assert compute == found.compute
    logits = output_bytes(model.inventory, outputs=sequences)
    for kind, nbytes in (("KV", found.kv_cache), ("compute", compute), ("output", logits)):
        assert logged(found, kind) == pytest.approx(nbytes / 2**20, abs=0.0101)


def test_the_predictions_are_not_all_of_one_part(models):
    """The cases differ in what fills the buffer: logits, attention, experts, masks."""
    parts = set()
    for name, kv_format, context, sequences, micro_batch in CASES:
        model = models(name)
        held = {"kv_format": kv_format, "context": context, "sequences": sequences}
        tokens = min(micro_batch, context * sequences)
        compute = compute_bytes(model.inventory, micro_batch=micro_batch, **held, **model.experts)
        logits = 4 * model.inventory.config["vocab_size"] * tokens
        mask = 2 * padded_context(context) * tokens
        parts |= {("logits", logits > compute / 2), ("mask", mask > compute / 2)}
    assert len(parts) == 4


@pytest.mark.parametrize("outputs", [1, 7])
def test_fewer_outputs_need_a_smaller_buffer(models, outputs):
    """As llama-server asks for; n_outputs_max is the second of three numbers."""

    class FewOutputs(LlamaCpp):
        def context_params(self, context, *, exact):
            params = super().context_params(context, exact=exact)
            params.states_and_outputs[1] = outputs
            return params

    model = models("grouped")
    held = {"kv_format": "f16", "context": 256, "sequences": 1, "micro_batch": 128}
    with FewOutputs(model.path, **held) as runtime:
        found = runtime.buffers().compute
    args = (model.inventory,)
    assert compute_bytes(*args, **held, **model.experts, outputs=outputs) == found
    assert found < compute_bytes(*args, **held, **model.experts)


class Simulated(LlamaCpp):
    """Reads headers alone and allocates nothing, but counts (no_alloc; as `llama_params_fit`)."""

    def model_params(self, *, repack):
        params = super().model_params(repack=False)
        load_mode = ctypes.c_int32.from_buffer(params, 24)
        assert load_mode.value == -1
        load_mode.value = 0  # LLAMA_LOAD_MODE_NONE: not mapped
        params.no_host_no_alloc_load_mtp[1] = True
        return params


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-120b"])
def test_models_in_their_full_size(tmp_path, name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    model = write_planned(tmp_path, config, config["num_local_experts"], "Q4_0")
    for kv_format, context, sequences, micro_batch in (
        ("f16", 8192, 1, 512),
        ("q8_0", 32768, 1, 512),
        ("q8_0/q4_0", 8192, 4, 2048),
        ("f16", 131072, 1, 64),
    ):
        held = {"kv_format": kv_format, "context": context, "sequences": sequences}
        held["micro_batch"] = micro_batch
        with Simulated(model.path, **held) as runtime:
            found = runtime.buffers()
        assert found.weights == model.weights > 20e9
        assert found.kv_cache == kv_cache_bytes(model.inventory, **held)
        assert found.compute == compute_bytes(model.inventory, **held, **model.experts)


def test_a_window_is_read_alone():
    """gpt-oss-120b: 36 layers, 18 of them over 128 cells; 8 heads of 64, keys and values."""
    inventory = planned_inventory(CONFIGS / "gpt-oss-120b.json")
    for fmt, head in (("f16", 128), ("q8_0", 64 + 4), ("q4_0", 32 + 4)):
        read = kv_read_bytes(inventory, kv_format=fmt, context=8192)
        assert read == 18 * (8192 + 128) * 2 * 8 * head
    assert kv_read_bytes(inventory, kv_format="f16", context=20) == 18 * (256 + 128) * 2 * 8 * 128


def test_windows_of_other_families_are_read_alone():
    """Four layers of 2 heads of 16, keys and values; three of AFMoE's and two of Laguna's slide."""
    small = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 4, "num_experts": 8,
        "moe_intermediate_size": 32, "sliding_window": 40,
    }  # fmt: skip
    afmoe = small | {"model_type": "afmoe", "num_shared_experts": 1, "num_dense_layers": 1}
    laguna = small | {
        "model_type": "laguna", "shared_expert_intermediate_size": 48,
        "num_attention_heads_per_layer": [4, 2, 2, 4],
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }  # fmt: skip
    for config, n_sliding in ((afmoe, 3), (laguna, 2)):
        read = kv_read_bytes(planned_inventory(config), kv_format="f16", context=512)
        cells = n_sliding * 40 + (4 - n_sliding) * 512
        assert read == cells * 2 * 2 * 16 * 2


def test_windows_are_llama_cpps():
    config = json.loads((CONFIGS / "gpt-oss-120b.json").read_text())
    for wrong, message in (
        ({"layer_types": ["full_attention"] * 36}, "in every other layer, from the first on"),
        ({"sliding_window": None}, "sliding_window is None, needed a number from 1"),
    ):
        with pytest.raises(TargetError, match=message) as caught:
            kv_read_bytes(planned_inventory(config | wrong), kv_format="f16", context=1)
        assert "\n" not in str(caught.value)
    del config["layer_types"]
    assert kv_read_bytes(planned_inventory(config), kv_format="f16", context=1)


@pytest.mark.parametrize("name", ["latent", "mixtral", "windows"])
def test_a_full_context_needs_no_more(models, name):
    model = models(name)
    with LlamaCpp(model.path, context=512, micro_batch=64, kv_format="q8_0") as runtime:
        before = runtime.buffers()
        runtime.logits([1, 2] * 256)
        assert runtime.buffers() == before


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_each_format_computes_about_the_same(saved, tmp_path, name):
    """Random weights; the cache in use is the one that was asked for."""
    folder = tmp_path / "model.gguf"
    layout = GGUF.layout(read_inventory(saved["qwen" if name == "grouped" else "deepseek"]))
    allocation = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(layout.inventory.n_experts))),
        formats=dict.fromkeys(layout.groups, "F32"),
        experts_used=layout.inventory.experts_used,
    )

    class Random(ZeroTensors):
        def encoded(self, group):
            shape = self.layout.groups[group].shape
            rng = np.random.default_rng(len(group))
            weights = rng.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)
            return weights.view(np.uint8)

        def full_precision(self, kept):
            return np.ones(kept.shape, np.float32)

    write_gguf(folder, layout, allocation, Random(layout, allocation))
    ids = np.random.default_rng(0).integers(0, 512, 100).tolist()
    found = {}
    head = {"grouped": 16, "latent": 256 + 16}[name]
    for kv_format in ("f16", "q8_0", "q4_0"):
        if head % 32 and kv_format != "f16":  # rows are whole blocks or nothing
            with pytest.raises(VerifyError, match=f"{kv_format} with block size 32"):
                LlamaCpp(folder, kv_format=kv_format)
            with pytest.raises(TargetError, match="choose f16"):
                kv_read_bytes(layout.inventory, kv_format=kv_format, context=1)
            continue
        with LlamaCpp(folder, kv_format=kv_format, micro_batch=32) as runtime:
            found[kv_format] = runtime.logits(ids)
    with LlamaCpp(folder) as runtime:
        exact = runtime.logits(ids)
    errors = [np.abs(logits - exact).mean() for logits in found.values()]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.05 * np.abs(exact).mean()


def test_latent_attention_has_one_row_and_one_format(models):
    model = models("latent")
    with pytest.raises(TargetError, match="needed one format; choose q8_0 or q4_0"):
        kv_read_bytes(model.inventory, kv_format="q8_0/q4_0", context=1)
    with pytest.raises(VerifyError, match=r"different K \(q8_0\) and V \(q4_0\)"):
        LlamaCpp(model.path, kv_format="q8_0/q4_0")


@pytest.mark.parametrize(
    "kv_format", ["", "q4_1", "f32", "q8_0/", "/q8_0", "q8_0/q8_0/q8_0", "F16"]
)
def test_unknown_formats_are_refused_in_one_line(models, kv_format):
    with pytest.raises(TargetError, match="needed one of f16, q8_0, q4_0") as caught:
        kv_parts(kv_format)
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError):
        LlamaCpp(models("latent").path, kv_format=kv_format)


def test_second_copies_of_weights_can_be_refused(tmp_path, make):
    model = write(tmp_path, make, GROUPED, 16, "Q4_0")
    with LlamaCpp(model.path, repack=False) as runtime:
        plain = runtime.buffers()
    with LlamaCpp(model.path) as runtime:
        assert runtime.buffers().weights == plain.weights == model.weights
    assert plain.repacked == 0


RESIDENT = """
import re, sys
from pathlib import Path
from allocator.export.gguf.llamacpp import LlamaCpp

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = resident()
with LlamaCpp(sys.argv[1], context=512, micro_batch=256, kv_format="q8_0", threads=2) as runtime:
    runtime.decode([1, 2] * 256)
    print(resident() - before)
"""


@pytest.mark.parametrize("name", ["latent, tied, wide", "mixtral", "windows"])
def test_a_process_grows_by_what_is_predicted(models, name):
    model = models(name)
    held = {"context": 512, "sequences": 1}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, model.path], capture_output=True, text=True, check=True
    )
    settings = {**held, "micro_batch": 256, **model.experts}
    buffers = (
        model.weights
        + kv_cache_bytes(model.inventory, kv_format="q8_0", micro_batch=256, **held)
        + compute_bytes(model.inventory, kv_format="q8_0", **settings)
        + output_bytes(model.inventory, outputs=512)
    )
    overhead = overhead_bytes(model.inventory, **settings)
    assert buffers < int(done.stdout) < buffers + overhead


def test_rotation():
    """Sizes as llama.cpp logs them (n_rot_k, n_rot_v) for heads of these widths."""
    for width, keys, values in ((32, 0, 0), (64, 64, 64), (96, 0, 0), (128, 128, 64), (160, 0, 0),
                                (192, 64, 64), (256, 256, 64), (512, 512, 64)):  # fmt: skip
        for fmt in ("q8_0", "q4_0"):
            assert rotation(fmt, width, values=False) == keys
            assert rotation(fmt, width, values=True) == values
        assert rotation("f16", width, values=False) == 0


def test_a_chain_in_place_needs_one_result():
    """By hand: two inputs of 1024 bytes; the sum lies in neither (an input is used again)."""
    graph = Graph()
    a, b = graph.input(256), graph.input(256)
    total = graph.add(a, b)
    graph.expand(graph.add(graph.add(total), a))
    assert graph.nbytes() == 2 * 1024  # total takes b's place, which is needed no more
