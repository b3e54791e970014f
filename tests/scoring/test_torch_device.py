"""Forward passes on another torch device, without one: what a GPU refuses is refused here too.

`elsewhere` is a device of torch's own extension point (PrivateUse1). Its tensors hold a tensor of
the host, and every operation of theirs runs on that one; but an operation that mixes both devices
raises as CUDA's does, and so does reading one from the host without a copy. What this cannot show
is how CUDA's kernels round, and how fast they are.
"""

import csv
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.reading import read_inventory
from allocator.codecs import codec_of
from allocator.codecs.blocks import Fields
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.errors import AllocatorError
from allocator.export.tensors import EncodedTensors
from allocator.finishing.codes import choose
from allocator.finishing.streamed_tuning import tune_streamed
from allocator.finishing.tuning import TuningSettings
from allocator.formats.ggml import FORMATS
from allocator.profiling.curvature import measure
from allocator.profiling.second_moments import second_moments, second_moments_streamed
from allocator.profiling.statistics import collect, collect_streamed
from allocator.scoring.candidates import Weights
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.scoring.swap_model import SwapModel
from allocator.study.trials import RESULT, allocation_of
from allocator.targets import target_named

torch.set_num_threads(1)
NAME = "elsewhere"
ATEN = torch.ops.aten
CROSSING = (ATEN._to_copy, ATEN.copy_)
OF_FLOATS = (ATEN.histc,)  # on the host; on CUDA of integers too
BY_HOST_INDICES = (ATEN.index, ATEN.index_put_)  # CUDA takes those too


class Elsewhere(torch.Tensor):
    """A tensor of that device."""

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=f"{NAME}:0"
        )
        made.raw = raw
        return made

    def tolist(self):
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, *args, **(kwargs or {}))


def check_devices(op, args, tensors):
    if op.overloadpacket in CROSSING:
        return
    indices = args[1] if op.overloadpacket in BY_HOST_INDICES else ()
    for tensor in tensors:
        here = not isinstance(tensor, Elsewhere) and tensor.dim() > 0
        if here and not any(tensor is index for index in indices):
            raise RuntimeError(f"{op}: tensors of {NAME} and of the host, {tuple(tensor.shape)}")


def run(op, *args, **kwargs):
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if torch.is_inference_mode_enabled() and op.has_kernel_for_dispatch_key(key):
        return op.decompose(*args, **kwargs)
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    check_devices(op, args, tensors)
    to = kwargs.get("device")
    held = {id(x.raw): x for x in tensors if isinstance(x, Elsewhere)}

    def inside(x):
        if isinstance(x, Elsewhere):
            return x.raw
        elsewhere = isinstance(x, torch.device) and x.type == NAME
        return torch.device("cpu") if elsewhere else x

    def outside(x):
        if not isinstance(x, torch.Tensor):
            return x
        return held[id(x)] if id(x) in held else Elsewhere(x)

    args, kwargs = pytree.tree_unflatten([inside(x) for x in flat], spec)
    if op.overloadpacket in OF_FLOATS:
        args = (args[0].float(), *args[1:])
    to_host = op.overloadpacket is ATEN._to_copy and to is not None and to.type != NAME
    into_host = op.overloadpacket is ATEN.copy_ and not isinstance(tensors[0], Elsewhere)
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes has no views
        found = op(*args, **kwargs)
        return found if to_host or into_host else pytree.tree_map(outside, found)


# as the module is imported: later, autograd has counted the devices
_setup_privateuseone_for_python_backend(NAME)
_factories = torch.library.Library("_", "IMPL")  # they have no tensor to dispatch on
_factories.fallback(run, "PrivateUse1")


@pytest.fixture(params=["deepseek", "qwen3"])
def layout(request, checkpoints):
    return target_named("gguf").layout(read_inventory(checkpoints[request.param]))


@pytest.fixture
def documents(make_documents):
    return make_documents((17, 17, 9, 9, 21))


@pytest.fixture
def encodings(layout, tmp_path):
    return Encodings(tmp_path, layout, {})


def candidates(layout):
    def candidate(fmt, first, *, experts_used=2, **changes):
        return Allocation.of(
            target="gguf",
            retained=dict.fromkeys(layout.layers, tuple(range(first, 8))),
            formats=dict.fromkeys(layout.groups, fmt) | changes,
            experts_used=experts_used,
        )

    late = {f"layers.{max(layout.layers)}.attention.o": "Q4_0"}
    return [
        candidate("Q8_0", 0),
        candidate("Q8_0", 0, **late),
        candidate("Q4_0", 2),
        candidate("Q5_0", 1, experts_used=1),
    ]


def same(a, b, tolerance=1e-6):
    for field in ("kl", "top1", "overlap", "nll"):
        np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=0, atol=tolerance)


def test_the_device_refuses_what_a_gpu_refuses():
    there, here = torch.ones(3, device=NAME), torch.ones(3)
    assert (there + there).cpu().tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="of elsewhere and of the host"):
        there + here
    with pytest.raises(RuntimeError, match="of elsewhere and of the host"):
        here[torch.zeros(1, dtype=torch.int64, device=NAME)]
    with pytest.raises(RuntimeError):
        there.numpy()


def test_losses_in_memory(layout, documents, encodings):
    there = Scorer(SwapModel(layout, encodings.decoded, device=NAME), documents, threads=4)
    here = Scorer(SwapModel(layout, encodings.decoded), documents)
    for candidate in candidates(layout):
        same(there.score(candidate), here.score(candidate))
    assert there.swap.model.lm_head.weight.device.type == NAME
    there.ensure_reference(len(documents))
    assert there.reference(0).device.type == NAME


def test_losses_layer_by_layer(layout, documents, encodings):
    there = StreamedScorer(
        StreamedModel(layout, Weights(layout, lambda: encodings), device=NAME), documents
    )
    here = StreamedScorer(StreamedModel(layout, Weights(layout, lambda: encodings)), documents)
    for a, b in zip(
        there.score_many(candidates(layout)), here.score_many(candidates(layout)), strict=True
    ):
        same(a, b)
    np.testing.assert_allclose(there.candidate_logits(1), here.candidate_logits(1), atol=1e-5)


def test_keys_and_values_are_encoded_on_the_host(documents, make_checkpoint, tmp_path):
    wide = {"hidden_size": 128, "head_dim": 64, "num_hidden_layers": 2}
    path = make_checkpoint(tmp_path / "wide", "qwen3", **wide)
    layout = target_named("gguf").layout(read_inventory(path))
    encodings = Encodings(tmp_path / "bank", layout, {})
    chosen = Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, tuple(range(8))),
        formats=dict.fromkeys(layout.groups, "Q8_0"),
        experts_used=2,
        kv_format="q4_0",
    )
    there = Scorer(SwapModel(layout, encodings.decoded, device=NAME), documents).score(chosen)
    here = Scorer(SwapModel(layout, encodings.decoded), documents).score(chosen)
    # a value that lies between two codes may fall to either
    np.testing.assert_allclose(there.kl, here.kl, rtol=1e-2)


def test_statistics(layout, documents, encodings, tmp_path):
    here = collect(SwapModel(layout, encodings.decoded).model, layout, documents)
    swapped = collect(SwapModel(layout, encodings.decoded, device=NAME).model, layout, documents)
    streamed = StreamedModel(layout, Weights(layout, lambda: encodings), device=NAME)
    for there in (swapped, collect_streamed(streamed, documents, scratch=tmp_path)):
        assert there.counts == here.counts
        for name, values in here.importance.items():
            np.testing.assert_allclose(there.importance[name], values, rtol=1e-4, err_msg=name)


def test_second_moments(layout, documents, encodings, tmp_path):
    groups = list(layout.groups.values())
    here = SwapModel(layout, encodings.decoded)
    swap = SwapModel(layout, encodings.decoded, device=NAME)
    for fisher in (True, False):
        pairs = zip(
            second_moments(swap, documents, groups, fisher=fisher),
            second_moments(here, documents, groups, fisher=fisher),
            strict=True,
        )
        for (group, there), (_, h) in pairs:
            assert there.device.type == NAME
            tolerance = 1e-4 * float(h.abs().max())
            torch.testing.assert_close(there.cpu(), h, rtol=2e-3, atol=tolerance, msg=group.name)
    expected = {group.name: h for group, h in second_moments(here, documents, groups, fisher=False)}
    streamed = StreamedModel(layout, Weights(layout, lambda: encodings), device=NAME)
    for group, places, there in second_moments_streamed(
        streamed, documents, groups, scratch=tmp_path, memory_bytes=0
    ):
        assert there.device.type == NAME
        h = expected[group.name][list(places)] if places else expected[group.name]
        tolerance = 1e-4 * float(h.abs().max())
        torch.testing.assert_close(there.cpu(), h, rtol=2e-3, atol=tolerance, msg=group.name)


@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K", "IQ4_XS", "Q4_1"])
def test_codes(name):
    form = codec_of(FORMATS[name]).block_format(FORMATS[name])
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 3, 256)).astype(np.float32)
    x = rng.normal(size=(2, 512, 256)).astype(np.float32)
    ints = {"dtype": torch.int32}
    start = Fields(  # ggml takes seconds to build the tables of some formats
        torch.full((2, 3, 256 // form.fmt.block, 1 + (form.minima is not None)), 0.1).half(),
        torch.zeros(2, 3, 256 // form.group, **ints),
        None if form.minima is None else torch.zeros(2, 3, 256 // form.group, **ints),
        torch.zeros(2, 3, 256 // form.unit, **ints),
    )
    moments = torch.from_numpy(x.transpose(0, 2, 1) @ x)
    given = torch.from_numpy(weights), form.pack(start), moments
    with torch.inference_mode():
        w, data, h = (tensor.to(NAME) for tensor in given)
        there = choose(w, data, form, h)
        here = choose(*given[:2], form, given[2])
    assert {t.device.type for t in (there.data, there.before, there.after)} == {NAME}
    torch.testing.assert_close(there.after.cpu(), here.after, rtol=1e-5, atol=0)
    assert (there.data.cpu() == here.data).float().mean() > 0.99


def test_tuning_layer_by_layer(layout, documents, make_documents, encodings, tmp_path):
    source = EncodedTensors(encodings, candidates(layout)[2])
    settings = TuningSettings(tokens=40, rate=0.004)

    def tuned(device):
        model = StreamedModel(layout, Weights(layout, lambda: encodings), device=device)
        scorer = StreamedScorer(model, make_documents([16, 9], 4))
        folder = tmp_path / device
        folder.mkdir()
        return tune_streamed(source, documents, scorer, settings, folder=folder, of="these")

    there, here = tuned(NAME), tuned("cpu")
    assert len(here.checks) == len(there.checks) == 2
    for mine, known in zip(there.checks, here.checks, strict=True):
        assert mine.loss == pytest.approx(known.loss, rel=1e-4)


@pytest.mark.slow
def test_the_gpu_check(monkeypatch, tmp_path):
    """Every part of it runs on the device, the tuning step too, and gives what the host gives."""
    scripts = Path(__file__).parents[2] / "studies/scale/scripts"
    monkeypatch.syspath_prepend(scripts)
    main = runpy.run_path(str(scripts / "gpu.py"))["main"]
    assert main(["--device", NAME, "--size", "tiny", "--csv", str(tmp_path / "gpu.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "gpu.csv").read_text().splitlines()))
    there = {row["what"]: row for row in rows if row["device"] == NAME}
    assert there.keys() == {row["what"] for row in rows if row["device"] == "cpu"}
    differences = {what: float(r["ratio"]) for what, r in there.items() if "difference" in what}
    assert len(differences) == 11
    assert max(differences.values()) < 1e-4, differences


def test_curvature_and_slope(layout, documents, encodings):
    def priced(device):
        swap = SwapModel(layout, encodings.decoded, device=device)
        scorer = Scorer(swap, documents)
        scorer.ensure_reference(len(documents))
        swap.put_allocation(candidates(layout)[0])
        found = measure(swap, documents, reference=scorer.reference)
        rng = np.random.default_rng(0)
        rows = {}
        for group in layout.groups.values():
            experts = range(8) if group.role.is_expert else ()
            change = rng.standard_normal(group.shape).astype(np.float32) * 0.01
            rows[group.name] = found.price(group, change, experts) + found.slope(group, change)
            tangent = found.tangent(group, change, experts)
            rows[group.name] += tangent.steps(2 * change, found.price(group, 2 * change, experts))
        return rows

    there, here = priced(NAME), priced("cpu")
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=2e-3, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("streamed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_study_from_profile_to_verify(checkpoints, write_study, tmp_path, streamed, monkeypatch):
    folder = write_study(tmp_path / "study", checkpoints["qwen3"])
    if streamed:
        with (folder / "study.toml").open("a") as file:
            file.write("\n[streamed]\ncandidates = 3\nrows = 0.5\n")
    on_host = shutil.copytree(folder, tmp_path / "host")
    options = {"threads": 1, "cache": tmp_path / "cache", "torch_device": NAME}
    result = api.search(folder, trials=6, **options)
    written = api.materialize(folder, result.pick, tmp_path / "out", **options)
    found = api.verify(folder, written.folder, tolerance=0.1, **options)
    known = json.loads(result.pick.read_text())["loss"]["search"]
    assert found.loss == pytest.approx(known, abs=1e-6)
    best = min(result.study.best_trials, key=lambda t: t.values[0])
    here = StudyFolder(on_host, threads=1, cache=tmp_path / "cache")
    losses = here.scorers.trials.score(allocation_of(best))
    assert here.scorers.trials.summary(losses)["loss"] == pytest.approx(
        best.user_attrs[RESULT]["loss"], abs=1e-6
    )


def test_a_device_that_is_not_there_is_one_line(fresh_study):
    for name in ("cuda:7", "warp", "meta:1:2", "meta", "hpu", "mkldnn"):
        with pytest.raises(AllocatorError, match=f"torch device '{name}'") as caught:
            StudyFolder(fresh_study, torch_device=name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
