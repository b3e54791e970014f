"""Holds a GPU against the CPU of the same machine: one table, in under five minutes.

    python studies/scale/scripts/gpu.py [--device cuda] [--size full|tiny] [--csv studies/scale/gpu.csv]

Builds a random checkpoint of DeepSeek-V3's form (`build_checkpoint.py`; full: 2.4 GB in BF16) in a
temporary folder, measures on the CPU, then on the device, and compares. A row says what, on which
device, its value and unit; `ratio` is the value over that of `versus`. Without such a device: one
line, exit status 2. `--device cpu` measures the CPU twice. At full size it needs some 20 GB of memory.
Whole commands on both devices are in `studies/device/scripts/torch_device.py`.

- Seconds are compared with a plain forward on the same device: stock transformers, float32, logits
  of every position, the same documents. A plain forward itself, and weights per second, are compared
  with the CPU's.
- A difference is the largest one from the CPU's, and its ratio is over the largest value; of losses,
  and of the quadratic that chosen codes leave over the one before, over the value itself. Of second
  moments the first 256 inputs are compared. Where a router decides between two equal experts, a
  rounding can send a token elsewhere: one document then differs by more than rounding.
- Peaks of memory are torch's allocator's on CUDA, on the CPU the process's so far; they are compared
  with the checkpoint's weights in float32.
"""

import argparse
import csv
import gc
import math
import os
import resource
import sys
import tempfile
import time
from functools import partial
from itertools import count, cycle
from pathlib import Path

import numpy as np
import torch
from build_checkpoint import build

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tensors import read_tensor
from allocator.codecs import codec_of
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.decision.baselines import mixed
from allocator.errors import AllocatorError
from allocator.export.tensors import EncodedTensors
from allocator.finishing.codes import choose
from allocator.finishing.kl_gradient import KlGradient
from allocator.finishing.relative_changes import RelativeChanges
from allocator.formats import format_named
from allocator.profiling.second_moments import second_moments
from allocator.scoring.candidates import Weights
from allocator.scoring.documents import Document, batches
from allocator.scoring.scorer import Scorer
from allocator.scoring.streamed_model import StreamedModel
from allocator.scoring.streamed_scorer import StreamedScorer
from allocator.scoring.swap_model import SwapModel, check_device
from allocator.targets import target_named

SIZES = {
    "full": {
        "layers": 3, "experts": 80, "experts_used": 8, "heads": 16, "hidden": 2048, "width": 1024,
        "dense_width": 8192, "vocabulary": 16384,
    },
    "tiny": {
        "layers": 2, "experts": 4, "experts_used": 2, "heads": 2, "hidden": 256, "width": 64,
        "dense_width": 160, "vocabulary": 512,
    },
}  # fmt: skip
TOKENS = {"full": (4, 256), "tiny": (4, 16)}  # documents, length of each
STEP_DOCUMENTS = 2
FORMATS = {  # points of grids, then a code per weight
    "full": ("IQ3_S", "IQ2_XXS", "IQ1_M", "Q6_K", "Q4_K", "Q2_K", "IQ4_XS"),
    "tiny": ("IQ2_XXS", "Q4_K"),
}
CODED = "layers.1.experts.gate"
MOMENTS = ("layers.1.attention.o", CODED, "layers.1.experts.down")
DEVICE_COPIES = {"full": 16, "tiny": 1}
"""Of an expert, whose codes are chosen at once on a device: one alone would leave it idle."""
WEIGHTS = "weights in float32"
PLAIN = ("seconds", "plain forward")
COLUMNS = ("what", "device", "value", "unit", "versus", "ratio")


class Machine:
    """A device, its clock and its memory."""

    def __init__(self, name):
        self.device = torch.device(name)
        self.on_cuda = self.device.type == "cuda"

    def wait(self):
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work):
        """Median of three runs after one that is not counted."""
        return float(np.median([self.once(work)[1] for _ in range(4)][1:]))

    def once(self, work):
        """What it gives, and its seconds; on CUDA those of a second run, when kernels are loaded."""
        for _ in range(1 + self.on_cuda):
            found = None  # not in memory beside what comes
            self.wait()
            began = time.perf_counter()
            found = work()
            self.wait()
            seconds = time.perf_counter() - began
        return found, seconds

    def forget(self):
        """Frees what is not in use any more, and begins a new peak."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self):
        if self.on_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Case:
    """A checkpoint, documents, and two allocations that differ in one projection."""

    def __init__(self, folder, size):
        self.path, self.size = folder / "model", size
        build(self.path, **SIZES[size])
        self.layout = target_named("gguf").layout(read_inventory(self.path))
        self.threads = os.cpu_count() or 1
        # one folder for both devices: the same encoded bytes, encoded once
        self.encodings = Encodings(folder / "encodings", self.layout, {}, threads=self.threads)
        n, length = TOKENS[size]
        ids = np.random.default_rng(0).integers(0, SIZES[size]["vocabulary"], (n, length))
        self.documents = [Document(tuple(row)) for row in ids.tolist()]
        n_experts = SIZES[size]["experts"]
        everyone = dict.fromkeys(self.layout.layers, tuple(range(n_experts)))
        one = mixed(self.layout, everyone, experts="Q4_0", rest="Q8_0", count=n_experts)
        other = Allocation.of(
            target="gguf",
            retained=one.retained_experts,
            formats={**one.format_of, CODED: "Q8_0"},
            experts_used=one.experts_used,
        )
        self.allocations = [one, other]

    @property
    def model_bytes(self):
        """Of its weights in float32."""
        return sum(4 * math.prod(t.shape) for t in self.layout.inventory.tensors.values())


class Measured:
    """What was measured on one device.

    Attributes:
        values: by what: value, unit, and what it is compared with: "cpu", weights, another value.
        results: by what: an array that is compared with the CPU's, and its unit.
        coded_moments: `1 x in x in`, the CPU's, of the inputs of the expert whose codes are chosen.
    """

    def __init__(self, case, name, coded_moments, began):
        self.case, self.machine = case, Machine(name)
        self.device = str(self.machine.device)
        self.values, self.results = {}, {}
        self.coded_moments = coded_moments
        for stage in (self.plain, self.scored, self.moments, self.step, self.streamed, self.codes):
            self.machine.forget()
            stage()
            peak = self.machine.peak_bytes()
            self.note(f"peak memory, {stage.__name__}", peak, "bytes", WEIGHTS)
            say(began, name, stage.__name__)

    def note(self, what, value, unit, versus):
        self.values[what] = value, unit, versus

    def plain(self):
        """Stock transformers."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.case.path, dtype=torch.float32)
        model = model.eval().to(self.machine.device)
        documents = self.case.documents
        chosen = batches(documents, 0, len(documents), n_tokens=2048)
        ids = [torch.tensor([documents[i].ids for i in b]).to(model.device) for b in chosen]

        @torch.inference_mode()
        def forward():
            for batch in ids:
                model(input_ids=batch, use_cache=False)

        self.note("plain forward", self.machine.seconds(forward), "seconds", "cpu")

    def scored(self):
        """Candidates in memory, everything encoded before."""
        swap = SwapModel(self.case.layout, self.case.encodings.decoded, device=self.device)
        scorer = Scorer(swap, self.case.documents, layer_input_bytes=0)
        losses = [scorer.score(allocation).kl for allocation in self.case.allocations]
        self.results["losses"] = np.concatenate(losses), "nats per token"
        self.note("loss", float(np.mean(losses[0])), "nats per token", "cpu")
        turns = cycle(self.case.allocations)
        changed = self.machine.seconds(lambda: scorer.score(next(turns)))
        self.note("scoring a candidate, one projection changed", changed, *PLAIN)
        unchanged = self.machine.seconds(scorer.score_installed)
        self.note("scoring a candidate, nothing changed", unchanged, *PLAIN)
        self.swap = swap

    def moments(self):
        """Second moments of the original's inputs, plain and Fisher-weighted."""
        self.swap.reset()
        groups = [self.case.layout.groups[name] for name in MOMENTS]
        for kind in ("plain", "Fisher"):

            def measure(fisher=kind == "Fisher"):
                measured = second_moments(self.swap, self.case.documents, groups, fisher=fisher)
                return {group.name: h for group, h in measured}

            found, seconds = self.machine.once(measure)
            self.note(f"second moments, {kind}", seconds, *PLAIN)
            for name, h in found.items():
                corner = h[..., :256, :256].cpu().numpy()
                self.results[f"second moments, {kind}, {name}"] = corner, ""
            if self.coded_moments is None:
                self.coded_moments = found[CODED][:1].cpu().clone()
            del found, h

    def step(self):
        """A tuning step: weights put into the model, forward, backward, gradient by changes."""
        documents = self.case.documents[:STEP_DOCUMENTS]
        changes = RelativeChanges(EncodedTensors(self.case.encodings, self.case.allocations[0]))
        gradient = KlGradient(self.swap, documents, changes.parameters(self.swap.model))
        nothing = np.zeros(changes.n, np.float32)
        names = map(str, count())  # another one each time, else nothing would be put anew

        def step():
            self.swap.put(changes.weights(nothing, next(names)).candidate)
            return gradient.at(
                range(len(documents)), lambda: changes.gradient(self.swap.model, nothing)
            )

        (_, found), seconds = self.machine.once(step)
        self.note("tuning step", seconds, *PLAIN)
        self.results["gradient by changes"] = found, "nats per token"
        del self.swap

    def streamed(self):
        """One candidate and the original, layer by layer."""
        weights = Weights(self.case.layout, lambda: self.case.encodings)
        model = StreamedModel(self.case.layout, weights, device=self.device)

        def score():
            scorer = StreamedScorer(model, self.case.documents)  # knows nothing of the original
            return scorer.score(self.case.allocations[0]).kl

        found, seconds = self.machine.once(score)
        self.note("streamed pass", seconds, *PLAIN)
        self.results["losses, streamed"] = found, "nats per token"

    @torch.inference_mode()
    def codes(self):
        """Codes of an expert, in the CPU's second moments."""
        layout = self.case.layout
        weights = read_tensor(layout.inventory, layout.groups[CODED].sources[0])[None]
        importance = np.ascontiguousarray(self.coded_moments.diagonal(dim1=-2, dim2=-1).numpy())
        copies = DEVICE_COPIES[self.case.size]
        for name in FORMATS[self.case.size]:
            fmt = format_named(name)
            codec, form = codec_of(fmt), codec_of(fmt).block_format(fmt)
            encoded = codec.encode(weights, fmt, importance, threads=self.case.threads)
            arrays = (torch.from_numpy(weights), torch.from_numpy(encoded), self.coded_moments)
            w, data, h = (array.to(self.machine.device) for array in arrays)
            choose(w[:, :1], data[:, :1], form, h)  # makes tables
            chosen, seconds = self.machine.once(partial(choose, w, data, form, h))
            self.results[f"codes, {name}"] = (chosen.after / chosen.before).cpu().numpy(), ""
            if self.machine.device.type != "cpu":
                w, data, h = (x.repeat(copies, 1, 1) for x in (w, data, h))
                _, seconds = self.machine.once(partial(choose, w, data, form, h))
            self.note(f"codes, {name}", w.numel() / seconds, "weights per second", "cpu")


def rows_of(measured, cpu):
    """The table of one device."""
    rows = []
    for what, (value, unit, versus) in measured.values.items():
        if versus == WEIGHTS:
            over = measured.case.model_bytes
        else:
            over = cpu.values[what][0] if versus == "cpu" else measured.values[versus][0]
        rows.append((what, value, unit, versus, value / over))
    for what, (found, unit) in measured.results.items():
        known = cpu.results[what][0]
        change, size = np.abs(found - known), np.abs(known)
        each = what.startswith(("losses", "codes"))
        ratio = change / np.maximum(size if each else size.max(), 1e-30)
        rows.append((f"{what}: difference", change.max(), unit, "cpu", ratio.max()))
    named = [
        (what, measured.device, float(value), unit, versus, float(ratio))
        for what, value, unit, versus, ratio in rows
    ]
    return [dict(zip(COLUMNS, row, strict=True)) for row in named]


def say(began, *words):
    print(f"{time.perf_counter() - began:6.1f} s ", *words, file=sys.stderr, flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args(arguments)
    try:
        check_device(given.device)
    except AllocatorError as error:
        print(error, file=sys.stderr)
        return 2
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        case = Case(Path(place), given.size)
        say(began, f"built, {case.model_bytes / 2e9:.2f} GB in BF16")
        cpu = Measured(case, "cpu", None, began)
        device = Measured(case, given.device, cpu.coded_moments, began)
    rows = [] if device.machine.device.type == "cpu" else rows_of(cpu, cpu)
    rows += rows_of(device, cpu)
    for row in rows:
        print(
            f"{row['what']:56s} {row['device']:6s} {row['value']:12.5g} {row['unit']:18s} "
            f"{row['ratio']:12.5g} x {row['versus']}"
        )
    if given.csv:
        with open(given.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
