"""Runs verbs with parsed arguments: each calls a function of `allocator.api` and prints its result.

In: the namespace of `allocator.cli.parsers`. Out: text on stdout, and the result. Invariant: what
is heavy is imported by the verb that needs it.
"""

import argparse
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.parsers import WIDTH
from allocator.files.progress import say
from allocator.units import show_bytes, show_seconds, show_size

if TYPE_CHECKING:
    import pandas as pd

    from allocator.app.resources import ResourceOptions

_NO_BREAK = "\u00a0"
"""Stands for a space of `_print_text` at which no line ends."""


def limit_optuna(args: argparse.Namespace) -> None:
    """Sets what Optuna writes to stderr, by --log-level."""
    import optuna

    optuna.logging.set_verbosity(
        logging.getLevelNamesMapping()[(args.log_level or "warning").upper()]
    )


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
    """Prints a paragraph in 80 columns; no word is broken, and no line at a `_NO_BREAK`."""
    lines = textwrap.fill(
        text, WIDTH, subsequent_indent=" " * indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    print(lines.replace(_NO_BREAK, " "), flush=flush)


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
    limit_optuna(args)

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
    duration, limit = f"up to {show_seconds(road.total_seconds)}", plan.seconds
    if limit is not None and limit < road.total_seconds:
        duration = f"{show_seconds(limit)}, the limit; without it {duration}"
    elif limit is not None:
        duration += f" of {show_seconds(limit)}"
    print(f"takes    {duration}, as timed just now:")
    stages = ", ".join(
        f"{stage} {show_seconds(s)}".replace(" ", _NO_BREAK) for stage, s in road.seconds.items()
    )
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
        _print_text(f"text: {line}", indent=6)
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
        _print_text(
            f"         {outcome.ratio:.3f} [{low:.3f}, {high:.3f}] of {outcome.baseline}, "
            "the best baseline that this study scored in full",
            indent=9,
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
    _print_text(f"text     {e.calibration[0]}", indent=9)
    _print_text(f"         {e.calibration[1]}", indent=9)
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


VERBS = {
    "quantize": _quantize,
    "inspect": _inspect,
    "init": _init,
    "plan": _plan,
    "profile": _profile,
    "search": _search,
    "front": _front,
    "explain": _explain,
    "diff": _diff,
    "score": _score,
    "finish": _finish,
    "materialize": _materialize,
    "imatrix": _imatrix,
    "verify": _verify,
    "evaluate": _evaluate,
    "report": _report,
    "compare": _compare,
    "reproduce": _reproduce,
}
"""What runs a verb: it calls a function of `allocator.api`, prints the result and returns it."""
