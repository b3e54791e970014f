"""Stock llama.cpp against transformers: the F32 file must compute what the checkpoint computes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from allocator.checkpoint.reading import read_inventory
from allocator.decision.allocation import Allocation
from allocator.errors import TargetError, VerifyError
from allocator.export.gguf.files import write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.targets import GGUF
from allocator.targets.gguf.metadata import yarn_betas
from allocator.targets.group_weights import group_weights

REFERENCE = Path(__file__).parents[3] / "studies/reference/model"
REPORT = REFERENCE.parent / "generated/report.jsonl"


class Modules:
    """A source of F32 bytes read from a transformers model, not from our readers."""

    def __init__(self, model, layout, retained):
        self.state = model.state_dict()
        self.layout, self.config = layout, model.config
        self.retained = retained

    def _weight(self, group):
        if group.role in ("attention.k_b", "attention.v_b"):
            name = f"model.layers.{group.layer}.self_attn.kv_b_proj.weight"
            heads, rank = self.config.num_attention_heads, self.config.kv_lora_rank
            halves = self.state[name].view(heads, -1, rank)
            k, v = halves.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=1)
            return k.transpose(1, 2) if group.role == "attention.k_b" else v
        if not group.role.is_expert:
            return self.state[group.sources[0]]
        experts = f"model.layers.{group.layer}.mlp.experts."
        if group.role == "experts.down":
            stacked = self.state[experts + "down_proj"]
        else:
            halves = self.state[experts + "gate_up_proj"].chunk(2, dim=1)
            stacked = halves[group.role == "experts.up"]
        return stacked[list(self.retained[group.layer])]

    def encoded(self, name):
        array = self._weight(self.layout.groups[name]).float().contiguous().numpy()
        return array.view(np.uint8)

    def full_precision(self, kept):
        weight = self.state[kept.source].float()
        if kept.role.has_row_per_expert:
            weight = weight[list(self.retained[kept.layer])]
        return weight.numpy()


def write_f32(path, checkpoint, model, retained=None, described=lambda inventory: inventory):
    """Writes the checkpoint as an all-F32 GGUF from the model's own tensors.

    `described` changes what the file says of the model.
    """
    layout = GGUF.layout(described(read_inventory(checkpoint)))
    everything = tuple(range(layout.inventory.n_experts))
    retained = retained or dict.fromkeys(layout.layers, everything)
    allocation = Allocation.of(
        target="gguf",
        retained=retained,
        formats=dict.fromkeys(layout.groups, "F32"),
        experts_used=layout.inventory.experts_used,
    )
    write_gguf(path, layout, allocation, Modules(model, layout, retained))
    assert path.stat().st_size == allocation.nbytes(layout).file
    return path


def with_gguf(inventory, **changes):
    """The inventory, of a family that describes itself otherwise to llama.cpp."""
    family = inventory.family
    return replace(inventory, family=replace(family, gguf=replace(family.gguf, **changes)))


def shrink(model, retained):
    """Removes experts in place, as transformers would compute a model trained without them."""
    for layer, kept in retained.items():
        mlp = model.model.layers[layer].mlp
        index = torch.tensor(kept)
        for module, names in (
            (mlp.experts, ("gate_up_proj", "down_proj")),
            (mlp.gate, ("weight", "e_score_correction_bias")),
        ):
            module.num_experts = len(kept)
            for name in names:
                if name in module._parameters:
                    shrunk = torch.nn.Parameter(module._parameters[name].data[index])
                    module._parameters[name] = shrunk
                elif name in module._buffers:
                    module._buffers[name] = module._buffers[name][index]
        if hasattr(mlp, "n_routed_experts"):
            mlp.n_routed_experts = mlp.gate.n_routed_experts = len(kept)


def expected(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def mean_kl(model, path, documents, **told):
    """Mean KL(transformers, llama.cpp) in nats per token."""
    found = []
    with LlamaCpp(path, context=256, threads=1, **told) as runtime:
        for ids in documents:
            p = expected(model, ids)
            q = torch.from_numpy(runtime.logits(ids)).double().log_softmax(-1)
            found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found).mean().item()


@pytest.fixture(scope="module")
def documents():
    with open(REPORT) as file:
        return [json.loads(next(file))["ids"][:256] for _ in range(3)]


def reference():
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference_f32(tmp_path_factory):
    return write_f32(tmp_path_factory.mktemp("f32") / "reference.gguf", REFERENCE, reference())


def random_ids(n_vocab, *, n_tokens=64, n_documents=2):
    rng = np.random.default_rng(0)
    return rng.integers(0, n_vocab, (n_documents, n_tokens)).tolist()


def save(model, path):
    model.eval()
    with torch.no_grad():  # logits far enough apart that a wrong forward shows
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
            elif "norm" in name:
                parameter.normal_(1, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    model.save_pretrained(path)
    return path


def qwen3_moe(path, **changes):
    config = dict(
        vocab_size=384, hidden_size=256, intermediate_size=320, moe_intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=12, num_experts_per_tok=3, norm_topk_prob=True, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config | changes))
    return model, save(model, path)


def deepseek_v3(path, **changes):
    config = dict(
        vocab_size=320, hidden_size=192, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=96,
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48,
        n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1, n_shared_experts=2,
        first_k_dense_replace=2, routed_scaling_factor=1.7, norm_topk_prob=True,
        max_position_embeddings=256, num_nextn_predict_layers=0, rope_interleave=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config | changes))
    return model, save(model, path)


def test_checkpoint_files_give_the_weights_of_the_modules():
    layout, model = GGUF.layout(read_inventory(REFERENCE)), reference()
    modules = Modules(model, layout, dict.fromkeys(layout.layers, range(24)))
    for name, group in layout.groups.items():
        weights = group_weights(layout, group)
        assert weights.shape == group.shape
        np.testing.assert_array_equal(weights.view(np.uint8), modules.encoded(name))


def test_reference_model_computes_the_same_in_llama_cpp(reference_f32, documents):
    assert mean_kl(reference(), reference_f32, documents) <= 1e-8


def test_pruned_reference_model_computes_the_same(tmp_path, documents):
    model, rng = reference(), np.random.default_rng(1)
    retained = {
        layer: tuple(sorted(rng.choice(24, 16, replace=False).tolist())) for layer in range(1, 6)
    }
    assert len(set(retained.values())) == 5
    path = write_f32(tmp_path / "pruned.gguf", REFERENCE, model, retained)
    shrink(model, retained)
    assert mean_kl(model, path, documents) <= 1e-8


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_moe_computes_the_same(tmp_path, tied):
    model, checkpoint = qwen3_moe(tmp_path / "model", tie_word_embeddings=tied)
    path = write_f32(tmp_path / "model.gguf", checkpoint, model)
    assert mean_kl(model, path, random_ids(384)) <= 1e-8


def test_pruned_qwen3_moe_computes_the_same(tmp_path):
    model, checkpoint = qwen3_moe(tmp_path / "model")
    retained = {0: (0, 2, 3, 5, 8, 9, 11), 1: (1, 2, 3, 4, 5, 6, 7), 2: (0, 1, 4, 6, 8, 10, 11)}
    path = write_f32(tmp_path / "model.gguf", checkpoint, model, retained)
    shrink(model, retained)
    assert mean_kl(model, path, random_ids(384)) <= 1e-8


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"n_group": 4, "topk_group": 2},
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32,
                "beta_slow": 1, "original_max_position_embeddings": 64, "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ],
    ids=["plain", "gates not normalised", "router groups", "yarn"],
)  # fmt: skip
def test_deepseek_v3_computes_the_same(tmp_path, changes):
    model, checkpoint = deepseek_v3(tmp_path / "model", **changes)
    path = write_f32(tmp_path / "model.gguf", checkpoint, model)
    assert mean_kl(model, path, random_ids(320, n_tokens=128)) <= 1e-8


def test_yarn_qwen3_moe_computes_the_same(tmp_path):
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model, checkpoint = qwen3_moe(tmp_path / "model", rope_parameters=rope)
    path = write_f32(tmp_path / "model.gguf", checkpoint, model)
    assert mean_kl(model, path, random_ids(384, n_tokens=128)) <= 1e-8


YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SCALED = {**YARN, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("make", "rope"),
    [
        (deepseek_v3, {**SCALED, "beta_fast": 1.0, "beta_slow": 1.0}),  # as Kimi-K2's
        (qwen3_moe, {**YARN, "beta_fast": 8, "beta_slow": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore")  # transformers' about the ratio of contexts
def test_llama_cpp_computes_with_other_betas_when_told(tmp_path, make, rope):
    model, checkpoint = make(tmp_path / "model", rope_parameters=rope)
    path = write_f32(tmp_path / "model.gguf", checkpoint, model)
    betas = yarn_betas(read_inventory(checkpoint))
    ids = random_ids(model.config.vocab_size, n_tokens=128)
    assert mean_kl(model, path, ids, yarn_betas=betas) <= 1e-8
    assert mean_kl(model, path, ids) > 0.05  # its loaders do not read what the file says


def test_mscale_of_qwen3_moe_is_refused_for_a_reason(tmp_path):
    """A file can say no more than it says of YaRN without the factors."""
    rope = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    model, checkpoint = qwen3_moe(tmp_path / "model", rope_parameters=rope)
    with pytest.raises(TargetError, match="rotated queries and keys of qwen3moe"):
        GGUF.layout(read_inventory(checkpoint))

    def without_factors(inventory):
        return replace(inventory, config={**inventory.config, "rope_parameters": YARN})

    path = write_f32(tmp_path / "model.gguf", checkpoint, model, described=without_factors)
    assert mean_kl(model, path, random_ids(384, n_tokens=128)) > 0.05


@pytest.mark.parametrize(
    ("layers", "vocab", "loads"),
    [(26, 64, True), (28, 64, False), (48, 64, False), (48, 128_256, True)],
)
def test_deepseek_v3_without_q_lora_rank(tmp_path, layers, vocab, loads):
    """llama.cpp itself says which depths it loads; the layout says the same."""
    model, checkpoint = deepseek_v3(
        tmp_path / "model", num_hidden_layers=layers, vocab_size=vocab, q_lora_rank=None,
        hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_attention_heads=1,
        num_key_value_heads=1, kv_lora_rank=32, qk_nope_head_dim=16, v_head_dim=16,
        n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=layers - 1,
    )  # fmt: skip
    if not loads:
        with pytest.raises(TargetError, match=f"got {layers} layers and {vocab:,} tokens"):
            GGUF.layout(read_inventory(checkpoint))

    def unchecked(inventory):
        return with_gguf(inventory, check=lambda facts: None)

    path = write_f32(tmp_path / "model.gguf", checkpoint, model, described=unchecked)
    if loads:
        ids = random_ids(64, n_tokens=16, n_documents=1)
        assert mean_kl(model, path, ids) <= 1e-8
        return
    with pytest.raises(VerifyError, match=r"attention\.q_lora_rank"), LlamaCpp(path):
        pass


@pytest.mark.parametrize(
    "key", ["expert_gating_func", "expert_weights_scale", "expert_weights_norm"]
)
def test_the_comparison_sees_a_missing_key(tmp_path, key):
    """llama.cpp loads such a file without a word: the reason why these tests exist."""

    def without_key(inventory):
        whole = inventory.family.gguf.hyperparameters
        assert key in dict(whole(inventory.facts))
        return with_gguf(
            inventory, hyperparameters=lambda facts: (p for p in whole(facts) if p[0] != key)
        )

    model, checkpoint = deepseek_v3(tmp_path / "model")
    path = write_f32(tmp_path / "model.gguf", checkpoint, model, described=without_key)
    assert mean_kl(model, path, random_ids(320)) > 1e-4


def test_greedy_text_is_that_of_transformers(reference_f32):
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = reference()
    prompt = tokenizer("<|endoftext|>Once upon a time")["input_ids"]
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24, do_sample=False, top_p=None, temperature=None,
        )  # fmt: skip
    with LlamaCpp(reference_f32, threads=1) as runtime:
        found = runtime.generate(prompt, 24)
        assert found == whole[0, len(prompt) :].tolist()
        assert runtime.detokenize(found) == tokenizer.decode(found)
        assert len(runtime.detokenize(found).split()) > 5


def test_tokenizer_is_that_of_transformers(reference_f32):
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    texts = ["Once upon a time", " don't\n\n  stop 12345!", "naïve 漢字 🙂\t", "a  b   c"]
    with LlamaCpp(reference_f32, threads=1) as runtime:
        for text in texts:
            assert runtime.tokenize(text) == tokenizer(text)["input_ids"]
            assert runtime.detokenize(runtime.tokenize(text)) == text


def test_logits_do_not_depend_on_what_ran_before(reference_f32, documents):
    with LlamaCpp(reference_f32, threads=1) as runtime:
        first = runtime.logits(documents[0][:32])
        runtime.generate(documents[1][:8], 4)
        np.testing.assert_array_equal(runtime.logits(documents[0][:32]), first)


def test_bad_files_and_tokens_are_refused_in_one_line(tmp_path, reference_f32):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(reference_f32.read_bytes()[:1_000_000])
    for path in (broken, tmp_path / "missing.gguf"):
        with pytest.raises(VerifyError, match=r"llama.cpp does not load it: .+") as caught:
            LlamaCpp(path)
        assert "\n" not in str(caught.value)
    with LlamaCpp(reference_f32, context=32, threads=1) as runtime:
        for ids in ([], [0] * 33, [8192], [-1]):
            with pytest.raises(VerifyError, match=r"needed 1..32 of 0..8191"):
                runtime.logits(ids)


def test_a_file_without_tokenizer_computes_but_does_not_tokenize(tmp_path):
    model, checkpoint = qwen3_moe(tmp_path / "model")
    path = write_f32(tmp_path / "model.gguf", checkpoint, model)
    with LlamaCpp(path, threads=1) as runtime:
        assert runtime.n_vocab == 384
        assert len(runtime.generate([1, 2, 3], 5)) == 5
        for call in (lambda: runtime.tokenize("text"), lambda: runtime.detokenize([1])):
            with pytest.raises(VerifyError, match="has no tokenizer"):
                call()


def test_the_runtime_does_not_load_torch():
    code = "import allocator.export.gguf.llamacpp as m, sys; m.library(); sys.exit('torch' in "
    code += "sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
