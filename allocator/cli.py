"""The command line: a table of verbs; each parses, calls a function of `allocator.api`, prints."""

import argparse
import atexit
import gc
import logging
import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from allocator.app.study_path import study_path
from allocator.errors import AllocatorError, SpaceError
from allocator.files.loading import show_loading
from allocator.files.progress import say, show_progress
from allocator.units import parse_bytes, parse_seconds, show_bytes, show_seconds, show_size

if TYPE_CHECKING:
    import pandas as pd

    from allocator.app.resources import ResourceOptions

_Action = TypeVar("_Action", bound=argparse.Action)
_WIDTH = 80
_LOG_LEVELS = ("debug", "info", "warning", "error")
_LOGGING_LIBRARIES = ("TRANSFORMERS", "DATASETS", "HF_HUB")  # which read their level at import
_LEAST_BYTES = 1024  # of a size without a unit: 12 is meant as 12GiB
_BY_NAME = ("finish", "score")  # which take a format's name in the place of an allocation file
_ROAD = {  # verbs in the order in which they are used
    "one command": ("quantize",),
    "before a search": ("inspect", "plan", "init"),
    "search": ("profile", "search", "finish"),
    "look": ("front", "explain", "diff", "report"),
    "measure": ("score", "evaluate", "compare"),
    "write": ("materialize", "verify", "reproduce", "imatrix"),
}
_EXIT_CODES = """\
exit codes: 0 done; 2 refused, with one line on stderr; 130 stopped by Ctrl-C,
and the same command resumes; any other code is a fault of the program.
`allocator VERB --help` explains a verb."""


def _options(args: argparse.Namespace) -> "ResourceOptions":
    options: ResourceOptions = {
        "cache": args.cache,
        "threads": args.threads,
        "progress": not args.quiet,
    }
    if "torch_device" in args:
        options["torch_device"] = args.torch_device
    return options


def _print_table(args: argparse.Namespace, table: "pd.DataFrame", *, keys: int = 1) -> None:
    """Prints a table that fits 80 columns, of whose parts each begins with the first `keys`."""
    from allocator.app.text_tables import table_text

    print(table_text(table, exact=args.exact, bold=sys.stdout.isatty(), keys=keys))


def _inspect(args: argparse.Namespace) -> Any:
    from allocator import api

    table = api.inspect(args.checkpoint, target=args.target, expert_width=args.expert_width)
    _print_table(args, table)
    print(f"{len(table)} groups, {table['weights'].sum():,} weights whose format is searched")
    _print_notes(table.attrs["notes"])
    return table


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        _print_text(f"note: {note}", indent=6)


def _print_text(text: str, *, indent: int = 0, flush: bool = False) -> None:
    """Prints a paragraph in 80 columns; no word is broken."""
    lines = textwrap.fill(
        text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    print(lines, flush=flush)


def _init(args: argparse.Namespace) -> Any:
    from allocator import api

    made = api.init(args.model, args.out, progress=not args.quiet, **_study_values(args))
    print(f"wrote {made.folder}/study.toml: every key, with what it means")
    for limit in made.budget.limits:
        _print_limit(limit)
    print(f"floor    {show_bytes(made.floor)}\nceiling  {show_bytes(made.ceiling)}")
    _print_notes(made.notes)
    print(f"next: allocator search {made.folder} --dry-run, then without --dry-run")
    return made


def _plan(args: argparse.Namespace) -> Any:
    from allocator import api

    plan = api.plan(
        args.config,
        device=_device(args),
        experts=args.experts or (),
        kv_format=args.kv_format,
        micro_batch=args.micro_batch,
        profile=args.profile,
        out=args.out,
        expert_width=args.expert_width,
        **_options(args),
    )
    s = plan.summary
    nextn = f", {s.nextn:,} more of multi-token prediction left out" if s.nextn else ""
    _print_text(
        f"{s.family}: {s.parameters:,} parameters, {s.active:,} active ({s.embedding:,} of them "
        f"the embedding){nextn}; {s.layers} layers, {s.moe_layers} with {s.experts} routed "
        f"experts, {s.experts_used} used"
    )
    print()
    _print_plan(args, plan)
    _print_notes(plan.notes)
    for c in plan.candidates if args.out else ():
        if c.name == "first":
            print(f"wrote {args.out}/first-{c.experts}.json")
    return plan


def _print_plan(args: argparse.Namespace, plan: Any) -> None:
    import pandas as pd

    _print_table(args, pd.DataFrame(plan.bounds), keys=2)
    print()
    if not plan.candidates:
        return
    items = ("weights", "kv_cache", "compute", "overhead", "reserve", "total")
    rows = [
        {"experts": c.experts, "allocation": c.name}
        | {
            "weights_bytes" if item == "weights" else item: getattr(c.memory, item)
            for item in items
        }
        | {
            "spare": c.spare,
            "fits": "yes" if c.fits else "no",
            "token_bytes": c.token_bytes,
            "tokens_per_second": c.tokens_per_second,
            "expected_loss": c.loss,
        }
        for c in plan.candidates
    ]
    _print_table(args, pd.DataFrame(rows), keys=2)
    print()


def _study_values(args: argparse.Namespace) -> Any:
    """Values of a new study that the command line gives."""
    names = (
        "target", "budget", "weights_budget", "bits", "calibration", "report", "space",
        "sampler", "trials", "seed", "tokenizer", "expert_width",
    )  # fmt: skip
    values = {name: getattr(args, name) for name in names} | {"device": _device(args)}
    return {name: value for name, value in values.items() if value is not None}


def _quantize(args: argparse.Namespace) -> Any:
    from allocator.checkpoint.hub import is_hub_id, model_path

    if not is_hub_id(args.model):  # an id is looked up once, by the first stage
        model_path(args.model)  # a wrong path is refused before anything is loaded
    _limit_optuna(args)

    from allocator.app.resources import Resources
    from allocator.pipeline.quantize import QuantizeRequest, plan_of, run

    request = QuantizeRequest(
        model=args.model,
        values=_study_values(args),
        out=args.out,
        seconds=args.time,
        finish=not args.no_finish,
        resources=Resources.of(_options(args)),
    )
    if args.dry_run:
        plan = plan_of(request)
        _print_quantize_plan(plan)
        return {"study": plan.study, "checkpoint": plan.checkpoint, "estimate": plan.road}

    def say(stage: str) -> None:
        print(f"-- {stage}", flush=True)

    quantized = run(request, on_plan=_print_quantize_plan, on_stage=say)
    _print_quantized(request.study, quantized)
    return quantized


def _print_quantize_plan(plan: Any) -> None:
    inventory, road = plan.inventory, plan.road
    search, weights = road.search, inventory.n_searched_weights
    print(f"model    {plan.model}")
    print(
        f"         {inventory.family.model_type}, {inventory.n_layers} layers, "
        f"{inventory.n_experts} experts, {weights:,} weights"
    )
    for limit in search.budget.limits:
        print(f"budget   {show_size(limit.nbytes)}, bounds the {limit.bounds}")
    print(f"range    smallest {show_size(search.floor)}, largest {show_size(search.ceiling)}")
    stages = ", ".join(f"{stage} {show_seconds(s)}" for stage, s in road.seconds.items())
    limit = "" if plan.seconds is None else f", at most {show_seconds(plan.seconds)}"
    print(f"takes    up to {show_seconds(road.total_seconds)}{limit}, as timed just now:")
    _print_text(f"         {stages}", indent=9)
    memory = (
        "layer by layer: the model is larger than the memory that is free"
        if road.memory_bytes is None
        else f"memory {show_size(road.memory_bytes)}"
    )
    print(f"         disk up to {show_size(road.disk_bytes)}, {memory}")
    print(f"study    {plan.study}: the same command resumes\nwrites   {plan.checkpoint}")
    for note in (*search.notes, *road.notes):
        _print_text(f"note     {note}", indent=9)
    sys.stdout.flush()


def _print_quantized(study: Path, q: Any) -> None:
    file = study / q.checkpoint / q.file
    print(f"wrote    {file}: {show_size(q.file_bytes)}, {q.bits:.3f} bits")
    _print_outcome(q.search)
    for split, before in q.loss.items():
        after = "" if q.finished is None else _finished_loss(before, q.finished[split])
        print(f"loss     {before:.6f}{after} on the {split} split")
    print(
        f"verified in its runtime: loss {q.runtime_loss:.6f} on the search split, divergence "
        f"{q.divergence:.2e}" + ("" if q.exact is None else f",\n         {q.exact:.1e} exactly")
    )


def _profile(args: argparse.Namespace) -> Any:
    from allocator import api

    profile = api.profile(args.study, **_options(args))
    _print_text(
        f"profile of checkpoint {profile.checkpoint[:12]} for target {profile.target}: "
        f"{len(profile.curvature)} groups, "
        f"{len(profile.measured) + sum(map(len, profile.pruned.values()))} "
        f"measured changes on {profile.measured_tokens:,} tokens, curvature from "
        f"{profile.curvature_tokens:,}, importance from "
        f"{profile.n_tokens:,}, {len(profile.unreached)} experts unreached; "
        f"{sum(profile.forward_tokens.values()):,} forward tokens in all"
    )
    return {
        "checkpoint": profile.checkpoint,
        "target": profile.target,
        "groups": len(profile.curvature),
        "measured_changes": len(profile.measured) + sum(map(len, profile.pruned.values())),
        "unreached": profile.unreached,
        "forward_tokens": sum(profile.forward_tokens.values()),
    }


def _search(args: argparse.Namespace) -> Any:
    from allocator import api

    launch = {
        "budget": args.budget,
        "weights_budget": args.weights_budget,
        "device": _device(args),
        "trials": args.trials,
        "seconds": args.time,
        "tokens": args.tokens,
        "storage": args.storage,
        "sampler": args.sampler,
        "seed": args.seed,
    }
    if args.dry_run:
        estimate = api.estimate(args.study, **launch, **_options(args))
        _print_estimate(estimate)
        return estimate
    result = api.search(
        args.study,
        **launch,
        join=args.join,
        workers=args.workers,
        **_options(args),
    )
    for message in result.messages:
        _print_text(message)
    for limit in result.budget.limits:
        _print_limit(limit)
    for line in result.calibration:
        print(f"text: {line}")
    print("trials: " + ", ".join(f"{n} {state}" for state, n in result.trials.items()))
    print("seconds: " + ", ".join(f"{what} {s:.1f}" for what, s in result.seconds.items()))
    _print_outcome(result.outcome)
    print(f"pick: {result.pick}\nknapsack alone: {result.knapsack or 'not finished'}")
    if result.memory is not None:
        print("the pick on the device")
        _print_memory(result.memory)
    return result


def _print_outcome(outcome: Any) -> None:
    """The pick of a search, and its distance to the best baseline."""
    low, high = outcome.loss_interval
    print(
        f"pick     {outcome.bits:.3f} bits, {show_size(outcome.file_bytes)}; loss "
        f"{outcome.loss:.5f} [{low:.5f}, {high:.5f}]\n         nats per token on the search split, "
        f"{outcome.selection:.5f} on selection"
    )
    if outcome.ratio is not None:
        low, high = outcome.ratio_interval
        print(
            f"         {outcome.ratio:.3f} [{low:.3f}, {high:.3f}] of {outcome.baseline},\n"
            "         the best baseline that this study scored in full"
        )


_DEVICE = {
    "device": "preset",
    "device_memory": "memory",
    "context": "context",
    "sequences": "sequences",
    "reserve": "reserve",
    "bandwidth": "bandwidth",
    "min_tokens_per_second": "min_tokens_per_second",
}


def _device(args: argparse.Namespace) -> Any:
    """What the command line says of a device; None if nothing."""
    given = {_DEVICE[n]: v for n in _DEVICE if (v := getattr(args, n)) is not None}
    if not given:
        return None

    from allocator.app.study_file import DeviceBudgetSpec

    if "preset" in given and os.path.exists(given["preset"]):  # else it is a name
        given["preset"] = os.path.realpath(given["preset"])
    return DeviceBudgetSpec(**given)


def _print_memory(memory: Any) -> None:
    for what in ("weights", "kv_cache", "compute", "overhead", "reserve", "total"):
        print(f"  {what:9s} {show_bytes(getattr(memory, what))}")


def _print_limit(limit: Any) -> None:
    print(f"budget   {show_bytes(limit.nbytes)}, bounds the {limit.bounds}")


def _print_estimate(e: Any) -> None:
    ends = ((e.floor, e.ceiling), *([e.beside] if e.beside else []))
    for limit, (floor, ceiling) in zip(e.budget.limits, ends, strict=True):
        _print_limit(limit)
        print(f"floor    {show_bytes(floor)}")
        print(f"ceiling  {show_bytes(ceiling)}")
    for name, memory in zip(("floor", "ceiling"), e.memory or (), strict=False):
        print(f"{name}, itemised")
        _print_memory(memory)
    print("text     {}\n         {}".format(*e.calibration))
    print(f"groups   {e.groups} with a choice; retained experts {e.counts[0]}..{e.counts[-1]}")
    print(
        f"trial    {e.seconds_per_full_trial:.1f} s on the full search split; losers stop earlier"
    )
    ready = "ready" if e.profile_ready else f"about {e.profile_seconds:.0f} s"
    print(f"profile  {ready}")
    until = {
        "trials": "if every trial is scored in full",
        "seconds": "with the profile, under the time limit",
        "tokens": "with the profile, under the limit on tokens",
    }
    print(f"total    about {e.total_seconds:.0f} s {until[e.limit]}")
    _print_notes(e.notes)


def _front(args: argparse.Namespace) -> Any:
    from allocator import api

    table = api.front(args.study, storage=args.storage, **_options(args))
    _print_table(args, table.drop(columns=["state", "tokens"]))
    return table


def _explain(args: argparse.Namespace) -> Any:
    from allocator import api

    table = api.explain(args.study, args.allocation, **_options(args))
    _print_table(args, table)
    for split, before, after in table.attrs["losses"]:
        finished = "" if after is None else _finished_loss(before, after)
        print(f"{split} loss {before:.6f} nats per token{finished}")
    return table


def _diff(args: argparse.Namespace) -> Any:
    from allocator.decision.difference import difference

    differences = difference(args.one, args.other)
    if len(differences.rows):
        _print_table(args, differences.rows)
    _print_text(differences.line)
    return differences


def _score(args: argparse.Namespace) -> Any:
    from allocator import api

    if args.allocation.suffix == ".gguf":
        table = api.score_gguf(
            args.study, args.allocation, documents=args.documents, **_options(args)
        )
        _print_table(args, table)
        _print_text(f"KL(original || file) in nats per token, by llama.cpp, {table.attrs['split']}")
        _print_notes(table.attrs["notes"])
        return table
    result = api.score(args.study, args.allocation, base=args.base, **_options(args))
    _print_score(args, result)
    return result


def _print_score(args: argparse.Namespace, score: dict[str, Any]) -> None:
    size = (lambda n: f"{n:,} B") if args.exact else show_size
    encoded, kept, file = (size(score["bytes"][part]) for part in ("encoded", "kept", "file"))
    domains = ", ".join(f"{name} {loss:.6f}" for name, loss in score["kl_by_domain"].items())
    layers = ", ".join(f"{n} in layer {layer}" for layer, n in score["experts"].items())
    counts = set(score["experts"].values())
    lines = {
        "loss": f"{score['loss']:.6f} nats per token, on {score['tokens']:,} tokens of the search "
        "split",
        "domains": domains,
        "top-1": f"{score['top1']:.4f}; overlap {score['overlap']:.4f}, perplexity "
        f"{score['perplexity']:.3f}",
        "size": f"{file} of the file: {encoded} of matrices ({score['effective_bits']:.3f} bits), "
        f"{kept} of routers and norms",
        "experts": layers if len(counts) > 1 else f"{min(counts)} in every layer",
        "digest": score["digest"],
    }
    for name, text in lines.items():
        _print_text(f"{name:8} {text}", indent=9)


def _finish(args: argparse.Namespace) -> Any:
    from allocator import api

    asked = {
        "base": args.base,
        "tokens": args.tokens,
        "tuning": not args.no_tuning,
        "seed": args.seed,
        "out": args.out,
    }
    if args.dry_run:
        e = api.estimate_finish(args.study, args.allocation, **asked, **_options(args))
        if args.resolve:
            print("of the given allocation; --resolve measures, and finishes another one")
        _print_finish_estimate(e)
        return e
    result = api.finish(
        args.study,
        args.allocation,
        **asked,
        seconds=args.time,
        resolve=args.resolve,
        on_estimate=_print_finish_estimate,
        **_options(args),
    )
    if (resolved := result.resolved) is not None:
        given = "" if resolved.given is None else f", {resolved.given:.6f} before"
        print(f"solved again: predicted loss, finished, {resolved.predicted:.6f}{given}")
    for split, before in result.before.items():
        finished = _finished_loss(before, result.after[split])
        print(f"loss on the {split} split {before:.6f}{finished}")
    if result.after == result.before:
        print("nothing gained on the selection split: the weights stay as they were")
    if result.recipe.stopped_steps is not None:
        print(f"tuning stopped after {result.recipe.stopped_steps} steps (--time)")
    print(f"finished weights: {result.artifact}\nrecord: {result.record}")
    return result


def _finished_loss(before: float, after: float) -> str:
    """A finished loss, and its share of the unfinished one, to append to that."""
    share = f" ({after / before:.3f} of it)" if before else ""
    return f", finished {after:.6f}{share}"


def _print_finish_estimate(e: Any) -> None:
    if e.ready:
        print("finished before with the same inputs; nothing to compute", flush=True)
        return
    _print_text(
        f"second moments from {e.moments_tokens:,} tokens, codes of {e.weights:,} weights, tuning "
        f"on {e.tuning_tokens:,} tokens"
    )
    parts = ", ".join(f"{what} {seconds:.0f}" for what, seconds in e.seconds.items())
    _print_text(f"about {e.total_seconds:.0f} s: {parts}")
    _print_text(
        f"disk {show_bytes(e.disk_bytes)}, memory {show_bytes(e.memory_bytes)} beside the model",
        flush=True,
    )


def _imatrix(args: argparse.Namespace) -> Any:
    from allocator import api

    paths = api.imatrix(args.study, args.out, allocation=args.allocation, **_options(args))
    for path in paths:
        print(f"wrote {path}")
    return {"files": paths}


def _materialize(args: argparse.Namespace) -> Any:
    from allocator import api

    written = api.materialize(
        args.study,
        args.allocation,
        args.out,
        container=args.container,
        floats=args.floats,
        record=args.record,
        shard_size=args.shard_size,
        unfinished=args.unfinished,
        **_options(args),
    )
    _print_written(written)
    return written


def _print_written(written: Any) -> None:
    from allocator.export.runtimes import runtime_named

    m = written.manifest
    _print_text(
        f"{written.folder / m.file}{' and shards' if m.in_shards else ''}: {m.file_bytes:,} bytes "
        f"= {m.tensor_bytes:,} tensors + {m.overhead_bytes:,} overhead, as predicted; "
        f"{m.shown_sha256}"
        + (f"; finished weights {m.weights_digest[:12]}" if m.weights_digest else "")
    )
    if written.options:
        runtime = runtime_named(m.container)
        _print_text(f"{runtime.program} must be told {written.options} (in {runtime.options_file})")


def _verify(args: argparse.Namespace) -> Any:
    from allocator import api

    v = api.verify(
        args.study,
        args.folder,
        documents=args.documents,
        tolerance=args.tolerance,
        encode=args.encode,
        allocation=args.allocation,
        **_options(args),
    )
    exact = f", {v.exact.divergence:.1e} in exact arithmetic{v.exact.part}" if v.exact else ""
    _print_text(
        f"{v.folder}: {v.n_tensors} tensors equal, {v.tensor_bytes:,} tensor bytes and "
        f"{v.file_bytes:,} file bytes as predicted; proxy loss {v.loss:.6f} in torch, "
        f"{v.runtime_loss:.6f} in {v.runtime.program}, {v.runtime.divergence_name} "
        f"{v.divergence:.2e}{exact}"
    )
    return v


def _evaluate(args: argparse.Namespace) -> Any:
    from allocator import api
    from allocator.files.atomic import write_whole
    from allocator.files.outputs import check_output_file

    if args.csv is not None:
        check_output_file("--csv", args.csv)
    measured: list[pd.DataFrame] = []

    def keep(table: "pd.DataFrame") -> None:
        measured[:] = [table]
        if args.csv:
            write_whole(args.csv, table.to_csv(index=False).encode())

    try:
        return api.evaluate(
            args.study,
            args.allocation or None,
            documents="all" if args.all else args.documents,
            text=args.text,
            baselines=args.baselines,
            pruned=args.pruned,
            tasks=_tasks(args.tasks),
            limit=args.limit,
            domains=args.domains,
            on_table=keep,
            **_options(args),
        )
    finally:  # also what was measured before something failed, or was stopped
        for table in measured:
            _print_table(args, table)


def _tasks(given: str | bool | None) -> bool | list[str]:
    return given.split(",") if isinstance(given, str) else bool(given)


def _report(args: argparse.Namespace) -> Any:
    from allocator import api

    path = api.report(
        args.study,
        out=args.out,
        allocation=args.allocation,
        storage=args.storage,
        **_options(args),
    )
    _print_text(f"wrote {path}: open it in a browser; it needs no network and may be mailed")
    return {"file": path}


def _reproduce(args: argparse.Namespace) -> Any:
    from allocator import api

    rebuilt = api.reproduce(args.allocation, args.out, study=args.study, **_options(args))
    for written in rebuilt:
        _print_written(written)
        m = written.manifest
        print(f"equal: {m.container} has the recorded sha256\n{m.sha256_of_weights}")
    return [{"written": w, "equal": True} for w in rebuilt]


def _compare(args: argparse.Namespace) -> Any:
    from allocator import api

    workers = args.threads or len(os.sched_getaffinity(0))
    options = {
        "targets": args.target,
        "samplers": args.sampler,
        "weights": args.weights,
        "seeds": args.seeds,
        "text": args.text,
        "cache": args.cache,
        "threads": workers,
        "baselines": args.baselines,
        "progress": not args.quiet,
    }
    e = api.estimate_compare(args.study, **options)
    baselines = (
        f", and at most {e.baseline_tokens:,} for {e.baselines} baselines" if e.baselines else ""
    )
    _print_text(
        f"{len(e.runs) + e.finished} runs, {e.finished} finished; {e.tokens:,} forward tokens to "
        f"go{baselines}, about {e.seconds / 60:.0f} min with {workers} workers",
        flush=True,
    )
    if args.dry_run:
        return e

    table = api.compare(args.study, **options, on_run=lambda run: say(f"finished {run.name}"))
    _print_table(args, table, keys=5)
    _print_text(f"wrote {args.study}/compare.csv, summary.csv, compare.png and runs/*.json")
    return table


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, needed a positive number")
    return int(text)


def _seconds(text: str) -> int:
    try:
        return parse_seconds(text)
    except AllocatorError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bytes(text: str) -> int:
    try:
        nbytes = parse_bytes(text)
    except AllocatorError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if text.isdecimal() and 0 < nbytes < _LEAST_BYTES:
        raise argparse.ArgumentTypeError(f"{text} bytes; needed a unit, e.g. {text}GiB")
    return nbytes


def _size(text: str) -> str:
    _bytes(text)
    return text


def _study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="folder with a study.toml")


def _allocation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "allocation", type=Path, help="allocation file, e.g. STUDY/allocations/pick.json"
    )


def _study_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--study", type=Path, help="study folder (default: the one that the allocation lies in)"
    )


def _runs_forward(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--torch-device",
        default="cpu",
        metavar="DEVICE",
        help="where forward passes run, e.g. cuda (default: cpu)",
    )


def _expert_width(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--expert-width",
        type=_positive,
        help="pad experts with zeros to N neurons, as expert_width in study.toml does",
    )


def _device_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--device", metavar="NAME", help="a preset, e.g. geforce-rtx-4090, or the file of one"
    )
    p.add_argument(
        "--device-memory", type=_size, help="bytes of everything on the device, e.g. 128GiB"
    )
    p.add_argument("--context", type=_positive, help="tokens of a sequence (default: 4096)")
    p.add_argument("--sequences", type=_positive, help="sequences held at once (default: 1)")
    p.add_argument(
        "--reserve", type=_size, help="bytes for everything else, e.g. 4GiB (default: 0)"
    )
    p.add_argument(
        "--bandwidth", type=_size, help="bytes that memory gives in a second, e.g. 273GB"
    )
    p.add_argument(
        "--min-tokens-per-second",
        type=float,
        help="that the bandwidth must allow when decoding",
    )


def _new_study(p: argparse.ArgumentParser) -> None:
    """A model, and values of its study."""
    p.add_argument("model", help="directory, GGUF, or an id on the Hugging Face hub")
    p.add_argument(
        "--out", type=Path, metavar="STUDY", help="its folder (default: named for the model, here)"
    )
    p.add_argument("--target", help="gguf (default) or safetensors")
    p.add_argument("--budget", type=_size, help="bytes of the whole file, e.g. 12GiB")
    p.add_argument("--weights-budget", type=_size, help="bytes of the searched matrices alone")
    p.add_argument("--bits", type=float, help="effective bits of these; init: 3 by default")
    _device_options(p)
    p.add_argument("--calibration", nargs="+", metavar="FILE", help="text for the search")
    p.add_argument(
        "--report",
        nargs="+",
        metavar="FILE",
        help="held-out text (default: an eighth of the other, which the search does not read)",
    )
    p.add_argument("--space", metavar="FILE", help="search space, or a shipped one by its name")
    p.add_argument("--sampler", help="default: auto")
    p.add_argument("--trials", type=int, help="in all (default: 100)")
    p.add_argument("--seed", type=int, help="of all that is drawn (default: 0)")
    p.add_argument(
        "--tokenizer",
        metavar="WHICH",
        help="checkpoint (default) or none: a gguf that reads token ids",
    )
    _expert_width(p)


def _set_log_level(level: str) -> None:
    """Sets what our own loggers, and those of libraries that are loaded later, write to stderr."""
    logging.getLogger("allocator").setLevel(level.upper())
    os.environ |= {f"{library}_VERBOSITY": level for library in _LOGGING_LIBRARIES}


def _limit_optuna(args: argparse.Namespace) -> None:
    import optuna

    optuna.logging.set_verbosity(
        logging.getLevelNamesMapping()[(args.log_level or "warning").upper()]
    )


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in 80 columns, also in another terminal, with the kind of value that an option takes."""

    _KINDS: ClassVar = {
        _positive: "N",
        int: "N",
        float: "X",
        _seconds: "TIME",
        Path: "PATH",
        _size: "SIZE",
        _bytes: "SIZE",
    }

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return self._KINDS.get(action.type, action.dest.upper())


class _Parser(argparse.ArgumentParser):
    own: tuple[argparse.Action, ...] = ()  # but the options of every verb

    def _add_action(self, action: _Action) -> _Action:
        self.own += (action,)
        return super()._add_action(action)

    def error(self, message: str) -> NoReturn:
        """One line, as every other refusal."""
        fault = message.removeprefix("argument ")
        self.exit(2, f"{self.prog}: {fault}; see {self.prog} --help\n")


class _PrintCompletion(argparse.Action):
    """Prints the completion of a shell."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        import shtab

        whole, verbs = _parsers(listed=True)
        for action in (action for verb in verbs.values() for action in verb.own):
            if action.type is Path or action.metavar == "FILE" or action.dest == "model":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(whole, shell=values))
        parser.exit()


def help_texts() -> dict[str, str]:
    """Returns the help of `allocator` and of every verb, in the order of their use, by command.

    No option has both a short name and a value, which Python 3.13 prints otherwise than 3.11.
    """
    parser, verbs = _parsers()
    named = {f"allocator {name}": verbs[name] for names in _ROAD.values() for name in names}
    plain = re.compile(r"\x1b\[[0-9;]*m")  # Python 3.14 prints in colours
    return {n: plain.sub("", p.format_help()) for n, p in ({"allocator": parser} | named).items()}


def _parsers(*, listed: bool = False) -> "tuple[_Parser, dict[str, _Parser]]":
    """The parser of the command line, and those of its verbs by name.

    Args:
        listed: argparse lists the verbs, too, as completion needs it.
    """
    parser = _Parser(
        prog="allocator",
        description=textwrap.fill(
            "Search how many experts each layer of an MoE model keeps and which format every "
            "tensor gets, inside a memory budget; write and verify the checkpoint.",
            _WIDTH,
        ),
        formatter_class=_Help,
    )
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        help="print what a shell completes verbs, options and files with, and exit",
    )
    parser.add_argument("--version", action="version", version=f"allocator {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", help="one of these:")
    texts: dict[str, str] = {}

    def verb(name: str, run: Any, text: str) -> _Parser:
        texts[name] = text
        shown: Any = {"help": text} if listed else {}
        sub = verbs.add_parser(name, description=text, formatter_class=_Help, **shown)
        sub.set_defaults(run=run)
        common = sub.add_argument_group("options of every verb")
        common.add_argument(
            "--cache", type=Path, help="profiles and encoded weights (default: $ALLOCATOR_CACHE)"
        )
        common.add_argument("--threads", type=_positive, help="cores to use (default: all)")
        common.add_argument("--quiet", action="store_true", help="no progress bars")
        common.add_argument(
            "--log-level",
            choices=_LOG_LEVELS,
            help="of messages of the program and its libraries on stderr (default: warning)",
        )
        common.add_argument("--exact", action="store_true", help="sizes in tables as exact bytes")
        common.add_argument(
            "--json", action="store_true", help="the result as one JSON document, and nothing else"
        )
        return sub

    p = verb("quantize", _quantize, "one command: search, finish, write and verify; resumable")
    _new_study(p)
    p.add_argument("--time", type=_seconds, help="time limit of all stages together, e.g. 2h")
    p.add_argument("--no-finish", action="store_true", help="write the pick unfinished")
    p.add_argument("--dry-run", action="store_true", help="print the plan and its estimate only")
    _runs_forward(p)

    p = verb("inspect", _inspect, "list the groups of a checkpoint; reads headers only")
    p.add_argument(
        "checkpoint",
        type=Path,
        help="directory with safetensors and config.json, or a GGUF in BF16, F16, F32 or Q8_0",
    )
    p.add_argument("--target", default="safetensors", help="gguf or safetensors (default)")
    _expert_width(p)

    p = verb("init", _init, "make a study of a model: a study.toml with every key, explained")
    _new_study(p)

    p = verb("plan", _plan, "what a model takes on a device, from its config.json alone")
    p.add_argument("config", type=Path, help="config.json, its directory, or a GGUF model")
    _device_options(p)
    p.add_argument(
        "--experts", type=_positive, nargs="+", metavar="N", help="retained counts to look at"
    )
    p.add_argument("--kv-format", help="of keys and values, e.g. q8_0 (default: f16)")
    p.add_argument("--micro-batch", type=_positive, help="tokens computed at once (default: 512)")
    p.add_argument("--profile", type=Path, help="study of a smaller relative, for its losses")
    p.add_argument("--out", type=Path, help="folder for the first allocations")
    _expert_width(p)

    p = verb("profile", _profile, "measure sensitivities; continues where it was stopped")
    _study(p)
    _runs_forward(p)

    p = verb("search", _search, "launch or resume a study; pick on the selection split")
    _study(p)
    p.add_argument(
        "--budget",
        type=_size,
        help="bytes of the whole file, e.g. 12MiB; also beside a device",
    )
    p.add_argument(
        "--weights-budget",
        type=_size,
        help="bytes of the searched matrices alone; also beside a device",
    )
    _device_options(p)
    p.add_argument(
        "--trials", type=_positive, help="trials in the study in total (default: study.toml)"
    )
    p.add_argument(
        "--time", type=_seconds, help="time limit, e.g. 30min; replaces study.toml's trials"
    )
    p.add_argument(
        "--tokens",
        type=_positive,
        help="limit on forward tokens, in all; replaces study.toml's trials",
    )
    p.add_argument("--sampler", help="auto, knapsack, evolution, nsga2, ... (default: study.toml)")
    p.add_argument("--seed", type=int, help="default: study.toml")
    p.add_argument(
        "--storage",
        help="database URL, grpc://HOST:PORT or journal:PATH (default: a journal in the folder)",
    )
    p.add_argument(
        "--workers",
        type=_positive,
        default=1,
        help="processes that search side by side, each with its share of the cores (default: 1)",
    )
    p.add_argument(
        "--join",
        action="store_true",
        help="work beside a search that runs on this machine; other machines need only --storage",
    )
    p.add_argument("--dry-run", action="store_true", help="print floor, ceiling and estimates only")
    _runs_forward(p)

    p = verb("front", _front, "list the non-dominated trials; writes front.json")
    _study(p)
    p.add_argument("--storage", help="as for search")

    p = verb("explain", _explain, "per decision: bytes, predicted loss, next step up and down")
    _allocation(p)
    _study_option(p)

    p = verb("diff", _diff, "which decisions two allocation files make differently")
    p.add_argument("one", type=Path, help="allocation file, or a written allocation.json")
    p.add_argument("other", type=Path, help="what it is compared with")

    p = verb("score", _score, "measure an allocation, llama-quantize tensor types, or a .gguf")
    _allocation(p)
    _study_option(p)
    p.add_argument(
        "--documents", type=_positive, help="of a .gguf: held-out documents (default: up to 48)"
    )
    p.add_argument("--base", help="tensor-type file: format of the tensors that it does not name")
    _runs_forward(p)

    p = verb("finish", _finish, "the same formats and bytes at less loss; resumable")
    p.add_argument(
        "allocation",
        type=Path,
        help="allocation file, llama-quantize tensor-type file, or a format: Q2_K, or Q2_K/Q6_K "
        "for routed experts and the rest",
    )
    _study_option(p)
    p.add_argument("--base", help="tensor-type file: format of the tensors that it does not name")
    p.add_argument("--no-tuning", action="store_true", help="choose codes anew, and tune nothing")
    p.add_argument(
        "--resolve",
        action="store_true",
        help="solve the study again for finished weights, under the limits of the allocation, and "
        "finish that one (record NAME-resolved)",
    )
    p.add_argument(
        "--tokens",
        type=_positive,
        help="most search tokens behind second moments and tuning (default: 65,536 and 61,440)",
    )
    p.add_argument(
        "--time",
        type=_seconds,
        help="time limit, e.g. 10min; ends tuning early, as the record says",
    )
    p.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    p.add_argument(
        "--out", help="name of the record (default: that of the file, or the format's name)"
    )
    p.add_argument("--dry-run", action="store_true", help="print the estimate only")
    _runs_forward(p)

    p = verb("materialize", _materialize, "write the checkpoint of an allocation")
    _allocation(p)
    p.add_argument("out", type=Path, help="directory to make")
    _study_option(p)
    p.add_argument("--container", help="gguf or safetensors (default: the target)")
    p.add_argument("--record", action="store_true", help="note the sha256 in the allocation file")
    p.add_argument(
        "--unfinished",
        action="store_true",
        help="write the weights as their codecs encode them, not the finished ones",
    )

    p.add_argument(
        "--floats",
        metavar="FORMAT",
        help="write all matrices in BF16, F16 or F32, e.g. the retained experts for llama-quantize",
    )
    p.add_argument(
        "--shard-size",
        metavar="SIZE",
        help="cut safetensors into files of at most so many bytes of tensors, with an index; none "
        "for one file (default: 5GB, where a limit on the file's bytes has room for the index)",
    )

    p = verb("imatrix", _imatrix, "write the importance as an imatrix for llama-quantize")
    _study(p)
    p.add_argument("out", type=Path, help="file to write: .gguf, or .dat for the binary form")
    p.add_argument(
        "--allocation",
        type=Path,
        help="its importance and retained experts (default: all experts); writes its formats too, "
        "for --tensor-type-file",
    )
    _runs_forward(p)

    p = verb("verify", _verify, "re-open a written checkpoint in its runtime and compare")
    p.add_argument("folder", type=Path, help="directory written by materialize")
    p.add_argument("--study", type=Path, required=True, help="study folder that it was made from")
    p.add_argument(
        "--allocation", type=Path, help="file it was made from, if not in the study's allocations"
    )
    p.add_argument("--documents", type=_positive, help="to score (default: those of a trial)")
    p.add_argument("--tolerance", type=float, help="how far the runtime may be off, nats per token")
    p.add_argument(
        "--encode",
        action="store_true",
        help="encode every tensor anew, without the cache, and compare (default: compare with the "
        "digests of the cached encodings)",
    )
    _runs_forward(p)

    p = verb(
        "evaluate", _evaluate, "held-out KL and perplexity beside uniform formats and role mixes"
    )
    _study(p)
    p.add_argument("--allocation", type=Path, action="append", help="default: allocations/*.json")
    p.add_argument("--documents", type=_positive, help="report documents (default: up to 48)")
    p.add_argument("--all", action="store_true", help="the full report split")
    p.add_argument("--text", type=Path, help="JSON lines with text to evaluate on instead")
    p.add_argument(
        "--baselines",
        choices=("near", "all", "none"),
        default="near",
        help="those near an allocation in bytes (the default), all, or none",
    )
    p.add_argument("--pruned", action="store_true", help="baselines also with fewer experts")
    p.add_argument("--domains", action="store_true", help="KL and perplexity per domain as well")
    p.add_argument(
        "--tasks",
        nargs="?",
        const=True,
        metavar="NAMES",
        help="lm-eval as well (slow): tasks made of held-out documents (default: report_perplexity,"
        "report_continuation), or of lm-eval by name, e.g. hellaswag,arc_easy, whose data is "
        "fetched from the Hugging Face hub",
    )
    p.add_argument(
        "--limit", type=_positive, help="questions of each task of lm-eval's (default: all)"
    )
    p.add_argument("--csv", type=Path, help="write the table there too")
    _runs_forward(p)

    p = verb("report", _report, "one HTML page of what a study found; measures nothing")
    _study(p)
    p.add_argument("--out", type=Path, help="file to write (default: STUDY/report.html)")
    p.add_argument(
        "--allocation", type=Path, help="record to report (default: STUDY/allocations/pick.json)"
    )
    p.add_argument("--storage", help="as for search")

    p = verb("compare", _compare, "searchers side by side at equal forward tokens; resumable")
    _study(p)
    p.add_argument("--sampler", action="append", help="only these of study.toml's; may be repeated")
    p.add_argument("--target", action="append", help="only these; may be repeated")
    p.add_argument("--weights", type=_bytes, action="append", help="only these budgets")
    p.add_argument("--seeds", type=_positive, help="at most so many seeds")
    p.add_argument("--text", type=Path, help="JSON lines with text: a further held-out split")
    p.add_argument(
        "--baselines",
        default="near",
        choices=("near", "none"),
        help="baselines beside the runs: near the budgets, or none (default: near)",
    )
    p.add_argument("--dry-run", action="store_true", help="print the estimate only")

    p = verb("reproduce", _reproduce, "rebuild a committed allocation's files; compares sha256")
    _allocation(p)
    p.add_argument("--out", type=Path, help="parent directory (default: STUDY/out)")
    _study_option(p)
    lines = [
        "\n".join((f"{part}:", *(f"    {name:12}{texts[name]}" for name in names)))
        for part, names in _ROAD.items()
    ]
    parser.epilog = "\n\n".join((*lines, _EXIT_CODES))
    return parser, verbs.choices


def _version() -> str:
    from allocator import __version__

    return __version__


def _check_study(args: argparse.Namespace) -> None:
    """Refuses a wrong path before anything is loaded; STUDY/allocations belongs to STUDY.

    Raises:
        AllocatorError: if there is no such allocation file or study folder.
    """
    if args.study is None:
        if not args.allocation.is_file():
            named = "; a format's name needs --study" if args.verb in _BY_NAME else ""
            raise SpaceError(f"{args.allocation}: no such allocation file{named}")
        args.study = Path(os.path.realpath(args.allocation)).parent.parent
    study_path(args.study)


def _run(args: argparse.Namespace) -> None:
    if not args.json:
        args.run(args)
        return
    with redirect_stdout(StringIO()):
        result = args.run(args)

    import json

    from allocator.app.plain_values import plain

    print(json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False))


def _places(args: argparse.Namespace) -> list[str]:
    """Where a verb may write: the paths that it was given, and the cache."""
    given = (getattr(args, name, None) for name in ("out", "study"))
    return [*(str(place) for place in given if place is not None), "the cache"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0, or 2 after one line on stderr when the input is wrong."""
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()  # argparse ends the program itself
    except BrokenPipeError:  # as of `allocator front STUDY | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str] | None) -> int:
    parser, _ = _parsers()
    args = parser.parse_args(argv)
    show_progress(not args.quiet)
    show_loading("torch")  # seconds, wherever a verb comes to need it
    atexit.register(gc.freeze)  # looking for garbage in all of torch takes seconds, too
    if args.log_level is not None:
        _set_log_level(args.log_level)
    try:
        if "study" in args:
            _check_study(args)
            _limit_optuna(args)
        _run(args)
    except BrokenPipeError:
        raise
    except AllocatorError as error:
        print(f"allocator {args.verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        places = [error.filename] if error.filename else _places(args)
        print(
            f"allocator {args.verb}: {' or '.join(places)}: {error.strerror or error}; needed a "
            "place that exists, may be written and has room",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"allocator {args.verb}: stopped; run the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
