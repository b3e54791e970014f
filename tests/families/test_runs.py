"""Every family that is read computes, and is written, as transformers and llama.cpp have it."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from allocator import api
from allocator.checkpoint.padding import padded
from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError
from allocator.export.checkpoint import materialize
from allocator.export.gguf.files import write_gguf
from allocator.export.tensors import EncodedTensors
from allocator.families import Role
from allocator.formats import format_named
from allocator.scoring.swap_model import SwapModel
from allocator.targets import GGUF, SAFETENSORS
from allocator.testing.family_runs import SMALL, FamilyRuns
from allocator.testing.tensors import CheckpointTensors

LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip


ROUNDING = 0.2
"""Most KL(torch || llama.cpp) as deployed: rounding turns choices of experts in random models."""


OURS = {"general.file_type", "general.name", "general.size_label", "tokenizer.ggml.model"}
"""Keys that differ from those of llama.cpp's converter whatever the family; see docs/gguf.md."""


class Runs(FamilyRuns):
    """Attributes:
    differs: keys that llama.cpp's converter writes otherwise, or not at all, or alone.
    released: keys of released configs that llama.cpp's converter reads.
    misread: how a file is refused that it makes of a config which it does not read wholly.
    """

    differs = ""
    released: ClassVar[dict[str, Any]] = {}
    misread = ""

    @pytest.mark.parametrize("pruned", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_llama_cpp_computes_the_same(self, case, tmp_path, pruned):
        super().test_llama_cpp_computes_the_same(case, tmp_path, pruned)

    @pytest.mark.slow
    def test_beside_llama_cpps_converter(self, case, convert, tmp_path):
        """Tensors are the same to the bit; keys are, but for those that docs/gguf.md lists."""
        convert(case.path, tmp_path / "theirs.gguf", vocabulary=False)
        layout = GGUF.layout(replace(read_inventory(case.path), without_tokenizer=True))
        allocation = Allocation.of(
            target="gguf",
            retained=dict.fromkeys(layout.layers, tuple(range(layout.inventory.n_experts))),
            formats=dict.fromkeys(layout.groups, "F32"),
            experts_used=layout.inventory.experts_used,
        )
        write_gguf(tmp_path / "ours.gguf", layout, allocation, CheckpointTensors(layout))
        ours, theirs = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
        keys = [
            {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
            for reader in (ours, theirs)
        ]
        different = {k for k in {*keys[0], *keys[1]} if keys[0].get(k) != keys[1].get(k)}
        print(self.config["model_type"], {k: [of.get(k, "-") for of in keys] for k in different})
        architecture = layout.inventory.family.for_gguf().architecture
        assert different == OURS | {f"{architecture}.{key}" for key in self.differs.split()}
        stored, wanted = ({t.name: t for t in reader.tensors} for reader in (ours, theirs))
        for name in [name for name in wanted if ".ffn_gate_up_exps." in name]:
            gates, ups = (name.replace("gate_up", kind) for kind in ("gate", "up"))
            both = np.concatenate([stored.pop(gates).data, stored.pop(ups).data], 1)
            np.testing.assert_array_equal(both, wanted.pop(name).data, name)
        assert set(stored) == set(wanted)
        for name, tensor in wanted.items():
            assert stored[name].tensor_type == tensor.tensor_type, name
            # axes of one are no matter: ERNIE's bias is a row there
            ours, theirs = (t.shape[t.shape > 1].tolist() for t in (stored[name], tensor))
            assert ours == theirs, name
            if name.endswith("ssm_a"):  # torch's exponential is another than numpy's
                np.testing.assert_allclose(stored[name].data, tensor.data, rtol=3e-7)
            else:
                data = tensor.data.reshape(stored[name].data.shape)
                np.testing.assert_array_equal(stored[name].data, data, name)

    @pytest.mark.slow
    def test_a_file_of_llama_cpps_converter_is_the_checkpoint(self, case, convert, tmp_path):
        """Read in place of the checkpoint, it has the logits that transformers computes."""
        source = tmp_path / "source"
        shutil.copytree(case.path, source)
        config = json.loads((source / "config.json").read_text())
        config |= self.released  # which transformers 5 does not save
        (source / "config.json").write_text(json.dumps(config))
        convert(source, tmp_path / "theirs.gguf", vocabulary=False)
        unread = read_inventory(case.path).family.for_gguf().source is None
        if refused := "is not read as a checkpoint yet" if unread else self.misread:
            with pytest.raises(CheckpointError, match=refused):
                read_inventory(tmp_path / "theirs.gguf")
            return
        layout = GGUF.layout(read_inventory(tmp_path / "theirs.gguf"))
        swap = SwapModel(layout, lambda *_: pytest.fail("nothing is encoded"))
        for ids, logits in zip(case.ids, case.logits, strict=True):
            with torch.no_grad():
                own = swap.model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(own, logits, rtol=0, atol=self.rounding)

    @pytest.mark.slow
    def test_padded_experts_compute_the_same(self, case):
        inventory = read_inventory(case.path)
        width = inventory.dimensions.expert_width + 32
        if any(tensor.role is Role.EXPERT_BIAS for tensor in inventory.tensors.values()):
            with pytest.raises(CheckpointError, match="leave expert_width out"):
                padded(inventory, width)
            return
        wide = padded(inventory, width)
        assert any(tensor.unpadded is not None for tensor in wide.tensors.values())
        swap = SwapModel(SAFETENSORS.layout(wide), lambda *_: pytest.fail("nothing is encoded"))
        for ids, logits in zip(case.ids, case.logits, strict=True):
            with torch.no_grad():
                own = swap.model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(own, logits, rtol=0, atol=self.rounding)

    @pytest.mark.slow
    def test_from_a_search_to_files_of_both_kinds(self, case, tmp_path, write_study):
        study = write_study(tmp_path / "study", case.path)
        options = {"cache": tmp_path / "cache", "threads": 1}
        api.search(study, trials=5, **options)
        pick = study / "allocations/pick.json"
        for container in ("gguf", "safetensors"):
            folder = tmp_path / container
            api.materialize(study, pick, folder, container=container, **options)
            tolerance = ROUNDING if container == "gguf" else None
            api.verify(study, folder, tolerance=tolerance, **options)

    @pytest.mark.slow
    def test_from_pretrained_is_the_candidate(self, case, tmp_path):
        self.compare_from_pretrained(case, tmp_path)

    def compare_from_pretrained(self, case, tmp_path):
        """A pruned model that transformers opens, with a cache and without, has its logits."""
        import allocator.transformers  # noqa: F401 - registers the quantizer

        target = GGUF if self.with_gguf else SAFETENSORS
        layout = target.layout(replace(read_inventory(case.path), without_tokenizer=True))
        allocation = Allocation.of(
            target=target.name,
            retained=dict.fromkeys(layout.layers, self.retained),
            formats={
                name: "Q8_0" if group.can_hold(format_named("Q8_0")) else "BF16"
                for name, group in layout.groups.items()
            },
            experts_used=layout.inventory.experts_used,
        )
        encodings = Encodings(tmp_path / "bank", layout, {})
        source = EncodedTensors(encodings, allocation)
        folder = tmp_path / "out"
        materialize(source, folder, container="safetensors", importance="i" * 64)
        swap = SwapModel(layout, encodings.decoded)
        swap.put_allocation(allocation)
        opener = AutoModelForCausalLM if self.renamed is None else type(case.model)
        model = opener.from_pretrained(folder)
        ids = torch.tensor(case.ids)
        with torch.no_grad():
            wanted = swap.model(ids).logits
            assert torch.allclose(model(ids).logits, wanted, rtol=0, atol=1e-5)
            assert not torch.allclose(wanted[0], case.logits[0], atol=1e-3)  # it is pruned
            options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
                output_logits=True, **options,
            )  # fmt: skip
            for step, logits in enumerate(made.logits):
                whole = swap.model(made.sequences[:, : ids.shape[1] + step], use_cache=False)
                torch.testing.assert_close(
                    logits, whole.logits[:, -1], rtol=0, atol=max(self.rounding, 1e-4)
                )


class TestQwen3Moe(Runs):
    differs = "rope.dimension_count vocab_size"
    config = SMALL | {
        "model_type": "qwen3_moe", "moe_intermediate_size": 96, "num_experts": 8,
        "norm_topk_prob": True,
    }  # fmt: skip


class TestDeepseekV3(Runs):
    released: ClassVar = {"scoring_func": "sigmoid"}
    differs = "expert_gating_func expert_group_count expert_group_used_count"
    config = SMALL | LATENT | {
        "model_type": "deepseek_v3", "first_k_dense_replace": 1, "moe_intermediate_size": 96,
        "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    }  # fmt: skip


class TestKimiK2(TestDeepseekV3):
    pytestmark = pytest.mark.slow  # computed as DeepSeek-V3
    renamed = "kimi_k2"


class TestDeepseekV2(Runs):
    differs = "expert_gating_func expert_group_count expert_group_used_count expert_weights_norm"
    config = SMALL | LATENT | {
        "model_type": "deepseek_v2", "first_k_dense_replace": 1, "moe_intermediate_size": 96,
        "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "topk_method": "greedy", "routed_scaling_factor": 1.5, "norm_topk_prob": False,
    }  # fmt: skip


class TestQwen2Moe(Runs):
    differs = "attention.key_length attention.value_length rope.dimension_count vocab_size"
    config = SMALL | {
        "model_type": "qwen2_moe", "moe_intermediate_size": 96, "num_experts": 8,
        "shared_expert_intermediate_size": 96, "norm_topk_prob": False, "qkv_bias": True,
    }  # fmt: skip


class TestOlmoe(Runs):
    differs = (
        "attention.key_length attention.value_length expert_feed_forward_length "
        "rope.dimension_count vocab_size"
    )
    config = SMALL | {
        "model_type": "olmoe", "num_experts": 8, "norm_topk_prob": False, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,  # which llama.cpp's converter writes whatever a config says
    }  # fmt: skip


class TestMixtral(Runs):
    differs = "expert_feed_forward_length"
    config = SMALL | {"model_type": "mixtral", "num_local_experts": 8}


class TestGlm4Moe(Runs):
    differs = "expert_group_count expert_group_used_count vocab_size"
    config = SMALL | {
        "model_type": "glm4_moe", "first_k_dense_replace": 1, "moe_intermediate_size": 96,
        "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.5, "norm_topk_prob": True, "attention_bias": True,
        "use_qk_norm": True, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0,
    }  # fmt: skip


class TestGlm4MoeLite(Runs):
    released: ClassVar = {"scoring_func": "sigmoid", "first_k_dense_replace": 1}
    differs = (
        "expert_gating_func expert_group_count expert_group_used_count leading_dense_block_count"
    )
    config = SMALL | LATENT | {
        "model_type": "glm4_moe_lite", "moe_intermediate_size": 96, "n_routed_experts": 8,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8,
        "norm_topk_prob": True, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_nextn_predict_layers": 0,
    }  # fmt: skip


class TestMinimaxM2(Runs):
    differs = "vocab_size"
    config = SMALL | {
        "model_type": "minimax_m2", "num_local_experts": 8, "rotary_dim": 8,
        "scoring_func": "sigmoid",
    }  # fmt: skip


class TestDots1(Runs):
    released: ClassVar = {"scoring_func": "sigmoid"}
    differs = (
        "expert_gating_func expert_group_count expert_group_used_count rope.dimension_count "
        "vocab_size"
    )
    config = SMALL | {
        "model_type": "dots1", "first_k_dense_replace": 1, "moe_intermediate_size": 96,
        "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_key_value_heads": 4,
        "sliding_window": None,
    }  # fmt: skip


LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip


class TestQwen3Next(Runs):  # llama.cpp has its heads in another order
    def test_from_pretrained_is_the_candidate(self, case, tmp_path):
        self.compare_from_pretrained(case, tmp_path)

    released: ClassVar = {"full_attention_interval": 2}
    differs = "full_attention_interval vocab_size"
    rounding = 1e-4  # linear attention divides by norms of short vectors
    config = SMALL | LINEAR | {
        "model_type": "qwen3_next", "moe_intermediate_size": 96, "num_experts": 8,
        "shared_expert_intermediate_size": 96, "norm_topk_prob": True, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    }  # fmt: skip


class TestQwen35MoeText(Runs):
    misread = r"blk\.0\.attn_k_norm\.weight is there"  # layer_types: it says every fourth
    differs = "attention.recurrent_layers full_attention_interval vocab_size"
    rounding = 1e-4
    config = SMALL | LINEAR | {
        "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 96, "num_experts": 8,
        "shared_expert_intermediate_size": 96,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        },
    }  # fmt: skip


class TestGptOss(Runs):  # its experts are stacked in the checkpoint
    def test_from_pretrained_is_the_candidate(self, case, tmp_path):
        self.compare_from_pretrained(case, tmp_path)

    differs = "rope.dimension_count vocab_size"
    config = SMALL | {
        "model_type": "gpt_oss", "num_local_experts": 8, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 150000.0, "truncate": True,
            "original_max_position_embeddings": 32,
        },
    }  # fmt: skip


class TestLfm2Moe(Runs):
    differs = "attention.key_length attention.value_length rope.dimension_count"
    config = {k: v for k, v in SMALL.items() if k != "head_dim"} | {
        "model_type": "lfm2_moe", "moe_intermediate_size": 96, "num_experts": 8, "norm_eps": 1e-6,
        "num_hidden_layers": 4, "num_dense_layers": 1, "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "tie_word_embeddings": True,
    }  # fmt: skip


class TestAfmoe(Runs):
    released: ClassVar = {"route_norm": True}
    differs = "attention.sliding_window_pattern expert_gating_func expert_weights_norm"
    config = SMALL | {
        "model_type": "afmoe", "moe_intermediate_size": 96, "num_experts": 8,
        "num_shared_experts": 2, "num_hidden_layers": 4, "num_dense_layers": 1, "route_scale": 1.5,
        "sliding_window": 16, "mup_enabled": True,
    }  # fmt: skip


class TestLaguna(Runs):
    @pytest.mark.slow
    def test_a_file_of_llama_cpps_converter_is_the_checkpoint(self, case, convert, tmp_path):
        """It does not say which layers have a window: they are read as llama.cpp takes them."""
        convert(case.path, tmp_path / "theirs.gguf", vocabulary=False)
        own, theirs = map(read_inventory, (case.path, tmp_path / "theirs.gguf"))
        assert theirs.config["layer_types"] == ["full_attention"] + ["sliding_attention"] * 3
        for name in own.tensors:
            assert own.tensors[name].shape == theirs.tensors[name].shape

    differs = "attention.sliding_window_pattern"
    config = SMALL | {
        "model_type": "laguna", "moe_intermediate_size": 96, "num_experts": 8,
        "shared_expert_intermediate_size": 64, "num_hidden_layers": 4, "sliding_window": 16,
        "num_attention_heads_per_layer": [4, 2, 2, 4], "moe_routed_scaling_factor": 1.5,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 500000.0,
                "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }  # fmt: skip


class TestErnie45Moe(Runs):
    differs = "rope.dimension_count vocab_size"
    config = SMALL | {
        "model_type": "ernie4_5_moe", "moe_intermediate_size": 96, "moe_num_experts": 8,
        "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "tie_word_embeddings": True, "intermediate_size": 384,  # heads of keys x shared width
    }  # fmt: skip


class TestHunyuanV1Moe(Runs):
    pytestmark = pytest.mark.slow  # names and a rotation beside what others have
    differs = (
        "context_length rope.dimension_count rope.scaling.factor "
        "rope.scaling.original_context_length rope.scaling.type vocab_size"
    )
    config = {k: v for k, v in SMALL.items() if k != "num_experts_per_tok"} | {
        # llama.cpp's converter takes heads of 128 alone, and lists
        "model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": [2] * 3,
        "moe_intermediate_size": [96] * 3, "num_shared_expert": [1] * 3, "hidden_size": 256,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
        "max_position_embeddings": 32768, "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    }  # fmt: skip


class TestGemma4(Runs):
    differs = "vocab_size"
    config = {k: v for k, v in SMALL.items() if k not in ("hidden_act", "num_experts_per_tok")} | {
        "model_type": "gemma4_text", "moe_intermediate_size": 96, "num_experts": 8,
        "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "attention_k_eq_v": True, "global_head_dim": 32, "num_global_key_value_heads": 1,
        "sliding_window": 16, "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }  # fmt: skip

    @contextmanager
    def rounds_as_llama_cpp(self, model):
        """llama.cpp reads GELU from a table of 16-bit floats, of 16-bit floats."""
        gelus = {module.act_fn for module in model.modules() if hasattr(module, "act_fn")}
        before = [m.register_forward_pre_hook(lambda _, x: x[0].half().float()) for m in gelus]
        after = [m.register_forward_hook(lambda _, __, y: y.half().float()) for m in gelus]
        yield
        for hook in (*before, *after):
            hook.remove()

    @pytest.fixture
    @classmethod
    def convert(cls, convert):
        """The converter counts tokens, and cuts the embedding's rows after them."""
        counted = {"model": {"vocab": {str(i): i for i in range(512)}}, "added_tokens": []}

        def run(checkpoint, file, **options):
            path = checkpoint / "tokenizer.json"
            path.write_text(json.dumps(counted))
            try:
                convert(checkpoint, file, **options)
            finally:
                path.unlink()

        return run


class TestNemotronH(Runs):
    misread = r"attn_k\.weight is there"  # full_attention: it says that no layer has heads of keys
    differs = (
        "attention.head_count_kv attention.layer_norm_rms_epsilon expert_group_count "
        "expert_group_used_count rope.dimension_count rope.freq_base rope.scaling.finetuned"
    )
    config = {k: v for k, v in SMALL.items() if k != "rms_norm_eps"} | {
        "model_type": "nemotron_h", "num_hidden_layers": 4, "layer_norm_epsilon": 1e-6,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2,
        "conv_kernel": 4, "chunk_size": 16, "time_step_min": 1e-30, "time_step_floor": 0.5,
        "moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 64,
        "n_routed_experts": 8, "routed_scaling_factor": 2.5,
    }  # fmt: skip


class TestNemotronHInLatents(TestNemotronH):
    differs = (
        "attention.head_count_kv attention.layer_norm_rms_epsilon rope.dimension_count "
        "rope.freq_base rope.scaling.finetuned"
    )
    config = TestNemotronH.config | {
        "moe_latent_size": 32, "n_group": 2, "topk_group": 1, "num_hidden_layers": 3,
        "layers_block_type": ["moe", "full_attention", "linear_attention"],
    }  # fmt: skip
