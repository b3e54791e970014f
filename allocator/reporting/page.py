"""The page of a report: headline, sections, and a line for whatever is not measured yet.

In: what `facts` read. Out: one HTML page. Invariants: every figure names its split; what is not
measured is a line with the command that measures it, never an empty chart; nothing is loaded from
elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files

import numpy as np

from allocator.app.held_out_file import HeldOutSplit
from allocator.app.tables import OUTSIDE, allocation_grid
from allocator.decision.front import Point, baseline_loss
from allocator.errors import BudgetError
from allocator.reporting import charts, intervals, text
from allocator.reporting.charts import Own
from allocator.reporting.facts import Facts
from allocator.reporting.intervals import Figure
from allocator.reporting.text import code, size

_OF_LIMIT = {
    "file": "the whole file",
    "weights": "the searched matrices",
    "device": "everything on the device",
}
_MEMORY = {
    "weights": "weights",
    "kv_cache": "keys and values",
    "compute": "compute buffers",
    "overhead": "the runtime's process",
    "reserve": "reserve",
}


def page(facts: Facts) -> str:
    """Returns the page as HTML."""
    return _Page(facts).html()


@dataclass(frozen=True)
class _Page:
    facts: Facts

    # -- what is reported

    @property
    def _study(self) -> str:
        return self.facts.study

    @cached_property
    def _title(self) -> str:
        model = self.facts.model
        return self._study if model is None else f"{model.name}, {self._study}"

    @cached_property
    def _name(self) -> str:
        """What the page calls the reported allocation."""
        record = self.facts.record
        return "the pick" if record is None or record.name == "pick" else record.name

    @cached_property
    def _own(self) -> dict[int, list[Own]]:
        """Held-out rows of the reported allocation, finished last, by place of their split."""
        record, held_out = self.facts.record, self.facts.held_out
        rows: dict[int, list[Own]] = {}
        if record is None or held_out is None:
            return rows
        for i, split in enumerate(held_out.splits):
            mine = []
            if (plain := split.of(record.digest, "")) is not None:
                unfinished = ", unfinished" if record.finished is not None else ""
                mine.append(Own(plain, False, self._name + unfinished))
            if record.weights_digest:
                finished = split.of(record.digest, record.weights_digest)
                if finished is not None:
                    mine.append(Own(finished, True, f"{self._name}, finished"))
            elif mine:
                mine = [Own(mine[0].row, True, self._name)]
            if mine:
                rows[i] = mine
        return rows

    @cached_property
    def _splits(self) -> list[tuple[HeldOutSplit, list[Own]]]:
        """Held-out splits with rows of the reported allocation, the most documents of each name."""
        held_out = self.facts.held_out
        if held_out is None:
            return []
        best: dict[str, tuple[HeldOutSplit, list[Own]]] = {}
        for i, split in enumerate(held_out.splits):
            if i in self._own:  # splits are in order of their numbers of documents
                known = best.get(split.split)
                complete = any(own.finished for own in self._own[i])
                if known is None or complete or not any(own.finished for own in known[1]):
                    best[split.split] = (split, self._own[i])
        return sorted(best.values(), key=lambda pair: (pair[0].split != "report", pair[0].split))

    @cached_property
    def _best(self) -> tuple[HeldOutSplit, Own] | None:
        """The held-out split of the headline, with the allocation's row there."""
        return (self._splits[0][0], self._splits[0][1][-1]) if self._splits else None

    def _command(self, verb: str) -> str:
        return code(f"allocator {verb}")

    @property
    def _evaluate(self) -> str:
        verb = f"evaluate {self._study}"
        if self.facts.file and self.facts.file.rpartition("/")[0] != "allocations":
            verb += f" --allocation {self._study}/{self.facts.file}"  # not among the default ones
        if self.facts.has_report_split:
            return self._command(verb)
        return (
            f"{self._command(f'{verb} --text FILE.jsonl')}, or with a {code('report')} split under "
            f"{code('[calibration]')} in study.toml, {self._command(verb)}"
        )

    @property
    def _search(self) -> str:
        return self._command(f"search {self._study}")

    @property
    def _no_allocation(self) -> str:
        return f"No allocation was picked yet: {self._search}."

    def _documents(self, split: HeldOutSplit) -> str:
        return f"{text.plural(len(split.tokens), 'document')}, {sum(split.tokens):,} tokens"

    def _split_name(self, split: HeldOutSplit) -> str:
        return "report split" if split.split == "report" else f"text {split.split}"

    # -- the page

    def html(self) -> str:
        """Returns the whole page."""
        source = files("allocator.reporting")
        css = source.joinpath("page.css").read_text(encoding="utf-8")
        script = source.joinpath("page.js").read_text(encoding="utf-8")
        sections: list[Callable[[], str]] = [
            self._held_out,
            self._front,
            self._bits,
            self._experts,
            self._roles,
            self._domains,
            self._prices,
            self._predicted,
            self._memory,
            self._finishing,
            self._rebuild,
        ]
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
            + self._headline()
            + '<div class="cards">\n'
            + "\n".join(section() for section in sections)
            + f"\n</div>\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
        )

    def _headline(self) -> str:
        model, record = self.facts.model, self.facts.record
        heading = self._study if model is None else model.name
        lines = [f"study {code(self._study)}"]
        if model is not None:
            lines.append(
                f"{escape(model.family)}, {model.parameters} parameters, {model.layers} layers, "
                f"{model.experts} routed experts of which a token uses {model.experts_used}"
            )
        limits = " and ".join(
            f"{size(n)} for {_OF_LIMIT.get(bounds, bounds)}" for n, bounds in self.facts.budget
        )
        known = None if record is None else record.bytes.get("budget")
        if known is not None and known not in [n for n, _ in self.facts.budget]:
            limits = size(known)  # of another search than the study's
        lines.append(f"target {code(self.facts.target)}")
        if limits:
            lines.append(f"budget {limits}")
        lead = f'<h1>{escape(heading)}</h1>\n<p class="lead">{"; ".join(lines)}.</p>\n'
        if record is None:
            running = (
                f"{text.plural(self.facts.running, 'trial')} running. "
                if self.facts.running
                else ""
            )
            return lead + (
                f'<p class="gap">No allocation was picked yet: the search has not ended. {running}'
                f"{self._search} goes on, and picks at its end.{self._least_so_far()}</p>\n"
            )
        tiles = [self._loss_tile(), self._size_tile(), self._bits_tile()]
        tiles += [tile for tile in (self._distance_tile(), self._finishing_tile()) if tile]
        gaps = []
        if self._best is None:
            gaps.append(f"No held-out figures of {escape(self._name)} yet: {self._evaluate}.")
        if record.finished is None:
            gaps.append(
                "Not finished; the same bytes at less loss: "
                f"{self._command(f'finish {self._study}/{self.facts.file}')}."
            )
        lines_below = "".join(f'<p class="gap">{gap}</p>\n' for gap in gaps)
        return f'{lead}<div class="tiles">{"".join(tiles)}</div>\n{lines_below}'

    def _least_so_far(self) -> str:
        trials = self.facts.trials
        done = trials[trials["complete"]] if len(trials) else trials
        if done.empty:
            return ""
        best = min(done.to_dict("records"), key=lambda r: (r["loss"], r["trial"]))
        return (
            f" The least KL so far is {text.loss(best['loss'])} nats per token on the search "
            f"split, at {best['effective_bits']:.3f} bits (trial {best['trial']})."
        )

    def _tile(self, what: str, value: str, *notes: str) -> str:
        below = "".join(f"<span>{note}</span>" for note in notes)
        return f'<div class="tile"><span class="what">{what}</span><b>{value}</b>{below}</div>'

    def _loss_tile(self) -> str:
        record = self.facts.record
        assert record is not None
        if self._best is not None:
            split, own = self._best
            figure = intervals.kl(split, own.row)
            return self._tile(
                f"KL of {escape(own.name)}",
                text.loss(figure.value),
                f"{text.within(figure)}, nats per token",
                f"{escape(self._split_name(split))}, held out, "
                f"{text.plural(len(split.tokens), 'document')}",
            )
        name = "selection" if "selection" in record.losses else next(iter(record.losses), "")
        if not name:
            return self._tile(
                "KL", "not measured", self._command(f"score {self._study}/{self.facts.file}")
            )
        finished = ", finished" if record.finished is not None else ""
        return self._tile(
            f"KL of {escape(self._name)}{finished}",
            text.loss(record.losses[name]),
            "nats per token",
            f"{escape(name)} split",
        )

    def _size_tile(self) -> str:
        record = self.facts.record
        assert record is not None
        notes = [f"{record.bytes['file']:,} bytes in the file"]
        limit = record.bytes.get("budget")
        bounds = self.facts.budget[0][1] if self.facts.budget else ""
        used = record.bytes.get(
            {"weights": "encoded", "device": "device_total"}.get(bounds, "file")
        )
        if limit and used is not None and (limit, bounds) in self.facts.budget:
            notes.append(f"{size(limit - used)} spare in the budget for {_OF_LIMIT[bounds]}")
        return self._tile("Size", size(record.bytes["file"]), *notes)

    def _bits_tile(self) -> str:
        record, model = self.facts.record, self.facts.model
        assert record is not None
        notes = ["effective bits per searched weight"]
        if model is not None:
            notes.append(
                f"{model.stored_bits:.4g} in the checkpoint, "
                f"{model.stored_bytes / record.bytes['encoded']:.1f} times as large"
            )
        return self._tile("Bits", f"{record.effective_bits:.3f}", *notes)

    def _distance_tile(self) -> str:
        if self._best is not None:
            split, own = self._best
            apart = intervals.distance(split, own.row)
            if apart is not None:
                same = "of its size" if apart.same_size else "that is no larger"
                return self._tile(
                    "KL over the best baseline's",
                    f"{apart.ratio.value:.2f}×",
                    f"{text.within(apart.ratio, 2)}; the best {same}, "
                    + ("between " if len(apart.against) > 1 else "")
                    + " and ".join(map(escape, apart.against)),
                    f"{escape(self._split_name(split))}, held out",
                )
        found = self._search_distance()
        if found is None:
            return ""
        ratio, what = found
        return self._tile(
            "KL over the best baseline's",
            f"{ratio:.2f}×",
            escape(what),
            "search split, which the search has seen; unfinished",
        )

    def _search_distance(self) -> tuple[float, str] | None:
        """The pick's loss over that of baselines among the trials, at its bytes, and which."""
        record, trials = self.facts.record, self.facts.trials
        if record is None or "search" not in record.loss or trials.empty:
            return None
        rows = trials[(trials["series"] == "baseline") & trials["complete"]]
        points = [
            Point(str(r["kind"]), int(r["bytes"]), float(r["loss"]))
            for r in rows.to_dict("records")
            if r["loss"] > 0
        ]
        nbytes, mine = record.bytes["encoded"], record.loss["search"]
        try:
            return mine / baseline_loss(points, nbytes), "the best of its size, between two trials"
        except BudgetError:
            smaller = [p for p in points if p.nbytes <= nbytes]
            if not smaller:
                return None
            best = min(smaller, key=lambda p: p.loss)
            return mine / best.loss, f"{best.name}, the best trial of a baseline that is no larger"

    def _finishing_tile(self) -> str:
        record = self.facts.record
        if record is None or record.finished is None:
            return ""
        if self._splits and len(self._splits[0][1]) > 1:
            split, (plain, finished) = self._splits[0]
            before, after = plain.row.kl, finished.row.kl
            where = f"{self._split_name(split)}, held out"
        else:
            name = "selection" if "selection" in record.finished.after else "search"
            if name not in record.finished.after or name not in record.finished.before:
                return ""
            before, after = record.finished.before[name], record.finished.after[name]
            where = f"{name} split"
        if not before > 0:
            return ""
        return self._tile(
            "KL over that before finishing",
            f"{after / before:.2f}×",
            f"{text.loss(before)} to {text.loss(after)} nats per token, the same bytes",
            escape(where),
        )

    # -- sections

    def _section(self, title: str, *parts: str, half: bool = False) -> str:
        kind = ' class="half"' if half else ""
        return f"<section{kind}>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"

    def _note(self, line: str) -> str:
        return f'<p class="note">{line}</p>'

    def _gap(self, line: str) -> str:
        return f'<p class="gap">{line}</p>'

    def _held_out(self) -> str:
        title = "Against baselines, held out"
        if not self._splits:
            older = self._older_baselines()
            if self.facts.record is None:
                return self._section(title, self._gap(self._no_allocation), older)
            return self._section(title, self._gap(f"Not measured yet: {self._evaluate}."), older)
        parts = []
        for split, own in self._splits:
            parts.append(
                f"<h3>{escape(self._split_name(split))}</h3>"
                + self._note(
                    f"Held out: no search has seen these {self._documents(split)}. Whiskers "
                    "are 95 % intervals over documents. Baselines are uniform formats "
                    "and mixes, routed experts / rest."
                )
            )
            entries = [("star", o.kind, o.name) for o in own]
            if split.baselines:
                entries += [("triangle", "base", "baseline"), ("line", "hull", "their lower hull")]
            parts.append(charts.legend(entries))
            for kind, large in (("on-wide", True), ("on-narrow", False)):
                drawn = charts.against_baselines(split, own, "kl", large=large)
                parts.append(f'<div class="{kind}">{drawn}</div>')
            axes = ["top1"] if split.original is None else ["perplexity", "top1"]
            small = (charts.against_baselines(split, own, a, large=False) for a in axes)
            parts.append(f'<div class="pair">{"".join(f"<div>{c}</div>" for c in small)}</div>')
            parts.append(self._held_out_table(split, own))
            if not split.baselines:
                parts.append(
                    self._gap(
                        "No baseline was measured beside it: "
                        f"{self._command(f'evaluate {self._study} --baselines all')}."
                    )
                )
        return self._section(title, *parts)

    def _older_baselines(self) -> str:
        rows = self.facts.older_baselines
        if rows.empty:
            return ""
        shown = [
            [escape(str(r["name"])), escape(str(r["split"])), escape(str(r["calibration"])),
             size(int(r["bytes"])), text.loss(float(r["kl"]))]
            for r in rows.sort_values(["split", "bytes", "name"]).to_dict("records")
        ]  # fmt: skip
        table = text.table(["baseline", "split", "calibration", "size", "KL"], shown, numbers=2)
        return f"<details><summary>Baselines that were measured before</summary>{table}</details>"

    def _held_out_table(self, split: HeldOutSplit, own: Sequence[Own]) -> str:
        names = {id(o.row): o.name for o in own}
        rows = [*split.baselines, *(o.row for o in own)]
        if split.original is not None:
            rows.append(split.original)
        cells = []
        for row in sorted(rows, key=lambda r: (r.bytes, r.name)):
            name = escape(names.get(id(row), row.name))
            figure = intervals.kl(split, row)
            is_original = row.kind == "original"
            cells.append(
                [
                    f"<b>{name}</b>" if id(row) in names else name,
                    f"{row.bits:.3f}",
                    size(row.bytes),
                    "0" if is_original else f"{text.loss(figure.value)} {text.within(figure)}",
                    f"{row.perplexity:.3f}",
                    f"{row.top1:.4f}",
                ]
            )
        header = ["", "bits", "searched matrices", f"KL, {escape(self._split_name(split))}",
                  "perplexity", "same top token"]  # fmt: skip
        return f"<details><summary>Figures</summary>{text.table(header, cells)}</details>"

    def _front(self) -> str:
        title = "The search: every trial"
        trials = self.facts.trials
        if trials.empty:
            return self._section(title, self._gap(f"No trial is in this folder: {self._search}."))
        states = trials["state"].value_counts()
        counts = ", ".join(
            f"{int(states[s])} {name}"
            for s, name in (
                ("COMPLETE", "scored in full"),
                ("PRUNED", "lost their race and were stopped early"),
                ("FAIL", "without a finite loss"),
            )
            if s in states
        )
        running = f", {self.facts.running} running" if self.facts.running else ""
        record = self.facts.record
        pick = None
        if record is not None and "search" in record.loss:
            pick = (record.effective_bits, record.loss["search"])
        entries = [("line", "front", "front")]
        entries += [
            charts.LOOKS[s]
            for s in ("proposal", "knapsack", "baseline")
            if (trials["series"] == s).any()
        ]
        if pick is not None:
            entries.append(("star", "pick", f"{self._name}, unfinished"))
        if (~trials["complete"]).any():
            entries.append(
                ("circle", "prop hollow", "lost its race: KL over its first documents alone")
            )
        return self._section(
            title,
            self._note(
                f"Search split. {text.plural(len(trials), 'trial')} of sampler "
                f"{code(self.facts.sampler)}: {counts}{running}. Lower and further left is better; "
                "the stairs are the least loss that is known at a size; at the right, the least so "
                "far. Hollow marks are not comparable with filled ones."
            ),
            charts.legend(entries),
            f'<div class="pair"><div>{charts.front(trials, pick)}</div>'
            f"<div>{charts.course(trials)}</div></div>",
        )

    def _bits(self) -> str:
        title = "Bits, tensor by tensor"
        decision = self.facts.decision
        if decision is None:
            return self._section(title, self._gap(self._no_allocation))
        return self._section(
            title,
            self._note(
                f"Effective bits per weight of {escape(self._name)}, scales included: rows are "
                "layers, columns their tensors. A column of experts is all retained experts of a "
                "layer. Not measured but decided, so no split."
            ),
            charts.bits_key(),
            charts.bits_map(decision),
            self._formats_table(),
        )

    def _formats_table(self) -> str:
        decision = self.facts.decision
        assert decision is not None
        grid = allocation_grid(decision)
        inside = [c for c in grid.columns if (grid.loc[grid.index != OUTSIDE, c] != "").any()]
        rows = [
            [escape(layer), *(escape(grid.at[layer, c]) for c in inside)]
            for layer in grid.index
            if layer != OUTSIDE
        ]
        others = ", ".join(
            f"{escape(c)} {escape(grid.at[OUTSIDE, c])}" for c in grid.columns if c not in inside
        )
        table = text.table(["layer", *map(escape, inside)], rows, numbers=0)
        below = self._note(f"Outside the layers: {others}.") if others else ""
        return f"<details><summary>Formats by name</summary>{table}{below}</details>"

    def _experts(self) -> str:
        title = "Retained experts"
        decision, profile, model = self.facts.decision, self.facts.profile, self.facts.model
        if decision is None:
            return self._section(title, self._gap(self._no_allocation))
        counts = list(decision.counts.values())
        n = model.experts if model is not None else None
        if n is None and profile is not None and profile.counts:
            n = len(next(iter(profile.counts.values())))
        of = "" if n is None else f" of {n}"
        if not counts:
            line = "No layer routes."
        elif len(set(counts)) == 1:
            line = f"Every MoE layer keeps {counts[0]}{of} routed experts."
        else:
            line = f"MoE layers keep {min(counts)} to {max(counts)}{of} routed experts."
        if profile is None or n is None or not set(decision.counts) <= set(profile.counts):
            rows = [[str(layer), str(k)] for layer, k in decision.counts.items()]
            same = len(set(counts)) == 1
            return self._section(
                title,
                f"<p>{line}</p>",
                "" if same else text.table(["layer", "retained"], rows),
                self._gap(
                    "How often each was routed is in the profile, which is not in this cache: "
                    f"{self._command(f'profile {self._study}')}."
                ),
            )
        return self._section(
            title,
            f"<p>{line}</p>",
            self._note(
                "Tokens routed to each expert by the original, over the layer's mean: search "
                f"split, {profile.n_tokens:,} tokens of the profile. The most routed expert "
                "of a layer is at the left; a small square is an expert that was removed."
            ),
            charts.routed_key(),
            charts.routed_map(decision, n, profile.counts),
        )

    def _roles(self) -> str:
        title = "Bytes by role"
        record, sizes = self.facts.record, self.facts.sizes
        if record is None:
            return self._section(title, self._gap(self._no_allocation), half=True)
        if not sizes:
            why = self.facts.no_model or "it is another checkpoint than this allocation's"
            return self._section(
                title, self._gap(f"The checkpoint cannot be read: {escape(why)}."), half=True
            )
        total = record.bytes["file"]
        rows = [
            [escape(r.role), text.bar(r.nbytes / sizes[0].nbytes), size(r.nbytes),
             f"{r.nbytes / total:.1%}", f"{r.nbytes * 8 / r.weights:.2f}"]
            for r in sizes
        ]  # fmt: skip
        for name, key in (("routers, norms, biases", "kept"), ("header and padding", "overhead")):
            if nbytes := record.bytes.get(key, 0):
                share = text.bar(nbytes / sizes[0].nbytes, "rest")
                rows.append([name, share, size(nbytes), f"{nbytes / total:.1%}", ""])
        return self._section(
            title,
            self._note(f"Of the file of {total:,} bytes, as written."),
            text.table(["", "", "bytes", "share", "bits"], rows, numbers=3),
            half=True,
        )

    def _domains(self) -> str:
        title = "KL by domain"
        for split, own in self._splits:
            if any(split.domains):
                return self._section(title, *self._held_out_domains(split, own), half=True)
        record = self.facts.record
        known = {} if record is None else self.facts.domains.get(record.digest, {})
        if record is None:
            return self._section(title, self._gap(self._no_allocation), half=True)
        if not any(known):
            return self._section(
                title, self._gap(f"Not measured yet: {self._evaluate}."), half=True
            )
        figures = {d: Figure(v, v, v) for d, v in known.items()}
        return self._section(
            title,
            self._note("Search split, which the search has seen; unfinished weights."),
            charts.domains([("star", "pick hollow", self._name, figures)], title),
            self._gap(f"Held out, with intervals: {self._evaluate}."),
            half=True,
        )

    def _held_out_domains(self, split: HeldOutSplit, own: Sequence[Own]) -> list[str]:
        domains = sorted(set(split.domains))
        rows: list[tuple[str, str, str, Mapping[str, Figure]]] = []
        mine = own[-1].row
        below = [r for r in split.baselines if r.bytes <= mine.bytes]
        nearest = min(
            below or split.baselines,
            key=lambda r: (abs(r.bytes - mine.bytes), r.name),
            default=None,
        )
        if nearest is not None:
            figures = {d: intervals.kl(split, nearest, d) for d in domains}
            rows.append(("triangle", "base", f"{nearest.name}, nearest baseline", figures))
        for o in own:
            rows.append(
                ("star", o.kind, o.name, {d: intervals.kl(split, o.row, d) for d in domains})
            )
        return [
            self._note(
                f"{escape(self._split_name(split))}, held out, {self._documents(split)}. "
                "Whiskers are 95 % intervals over documents."
            ),
            charts.legend([(shape, kind, name) for shape, kind, name, _ in rows]),
            charts.domains(rows, "KL by domain"),
        ]

    def _prices(self) -> str:
        title = "What bits are worth, role by role"
        profile = self.facts.profile
        if profile is None:
            return self._section(
                title,
                self._gap(
                    "The profile is not in this cache: "
                    f"{self._command(f'profile {self._study}')} measures it."
                ),
            )
        rows = charts.role_prices(profile, self.facts.decision)
        if not any(p[1] > 0 for row in rows for p in row.points):
            return self._section(title, self._gap("The profile has no losses above zero."))
        star = [] if self.facts.decision is None else [("star", "pick", f"{self._name} here")]
        return self._section(
            title,
            self._note(
                "KL, nats per token, that all tensors of a role lose in one format over its "
                "bits, all else original: predicted to second order from the profile, search "
                f"split, {profile.curvature_tokens:,} tokens. Both axes are the same in every "
                "plot; roles that lose most come first."
            ),
            charts.legend([("circle", "prop", "a format"), ("line", "front", "lower hull"), *star]),
            charts.prices(rows),
        )

    def _predicted(self) -> str:
        title = "Predicted against measured"
        trials = self.facts.trials
        rows = [r for r in trials.to_dict("records") if charts.is_comparable(r)]
        if len(rows) < 2:
            return self._section(
                title,
                self._gap(f"Fewer than two trials were scored in full: {self._search}."),
                half=True,
            )
        ratios = np.array([r["loss"] / r["predicted"] for r in rows])
        series = [
            s for s in ("proposal", "knapsack", "baseline") if any(r["series"] == s for r in rows)
        ]
        return self._section(
            title,
            self._note(
                f"Search split, {text.plural(len(rows), 'trial')} scored in full. Measured over "
                f"predicted: median {np.median(ratios):.2f}, from {ratios.min():.2f} to "
                f"{ratios.max():.2f}. The prediction is the profile's, before any trial taught it."
            ),
            charts.legend([charts.LOOKS[s] for s in series] + [("line", "hull", "equal")]),
            charts.predicted(self.facts.trials),
            half=True,
        )

    def _memory(self) -> str:
        title = "Device memory"
        memory, workload = self.facts.memory, self.facts.workload
        if memory is None or workload is None:
            return self._section(
                title, self._gap(f"Left out: {escape(self.facts.no_memory)}."), half=True
            )
        items = [(name, getattr(memory, key)) for key, name in _MEMORY.items()]
        largest = max(n for _, n in items) or 1
        rows = [
            [name, text.bar(n / largest), size(n), f"{n / memory.total:.1%}"] for name, n in items
        ]
        rows.append(["<b>total</b>", "", f"<b>{size(memory.total)}</b>", ""])
        limit = next((n for n, bounds in self.facts.budget if bounds == "device"), None)
        if self.facts.is_device_budget and limit is not None:
            rows.append(["spare", "", size(limit - memory.total), f"{limit - memory.total:,} B"])
        sequences = text.plural(workload.sequences, "sequence")
        decision = self.facts.decision
        kv = "" if decision is None else f", keys and values in {escape(decision.kv_format)}"
        why = (
            "the device of the budget"
            if self.facts.is_device_budget
            else "no device was a budget, so this is what one would need"
        )
        return self._section(
            title,
            self._note(
                f"Predicted, not measured: {sequences} of {workload.context:,} tokens{kv}; {why}."
            ),
            text.table(["", "", "bytes", "share"], rows, numbers=2),
            half=True,
        )

    def _finishing(self) -> str:
        title = "What finishing changed"
        record = self.facts.record
        if record is None:
            return self._section(title, self._gap(self._no_allocation))
        finished = record.finished
        if finished is None:
            command = self._command(f"finish {self._study}/{self.facts.file}")
            return self._section(
                title,
                self._gap(f"{escape(self._name).capitalize()} is not finished: {command}."),
            )
        rows: list[tuple[str, float, float]] = []
        for split, own in self._splits:
            if len(own) > 1:
                before, after = own[0].row.kl, own[-1].row.kl
                rows.append((f"{escape(self._split_name(split))}, held out", before, after))
        for name, before in finished.before.items():
            if name in finished.after:
                rows.append((f"{escape(name)} split", before, finished.after[name]))
        cells = [
            [name, text.loss(before), text.loss(after),
             f"{after / before:.3f}" if before > 0 else ""]
            for name, before, after in rows
        ]  # fmt: skip
        recipe = finished.recipe
        parts = ", ".join(map(str, recipe.get("parts", ())))
        lines = [
            f"Changed: {escape(parts)}. Formats and bytes are the same.",
            f"Second moments from at most {int(recipe.get('moments_tokens', 0)):,} tokens of the "
            f"search split, tuning on at most {int(recipe.get('tuning_tokens', 0)):,}.",
        ]
        changed = self.facts.changed
        if changed is not None:
            groups = len(record.decision.formats)
            lines.append(
                f"Other bytes in {text.plural(len(changed.groups), 'encoded tensor')} of {groups} "
                f"groups, other values in {text.plural(len(changed.values), 'norm or router')}."
                .replace("norm or routers", "norms and routers")
            )  # fmt: skip
        if recipe.get("stopped_steps") is not None:
            lines.append(f"A time limit ended tuning after {int(recipe['stopped_steps'])} steps.")
        return self._section(
            title,
            text.table(["KL, nats per token", "before", "after", "ratio"], cells),
            *(f"<p>{line}</p>" for line in lines),
        )

    def _rebuild(self) -> str:
        title = "Rebuild it"
        record = self.facts.record
        report = f"allocator report {self._study}"
        if record is None:
            return self._section(title, f"<pre>{escape(report)}</pre>")
        allocation = f"{self._study}/{self.facts.file}"
        commands = []
        if record.sha256:
            commands.append(f"allocator reproduce {allocation}")
        else:
            out = f"{self._study}/out/{record.name}"
            commands.append(f"allocator materialize {allocation} {out} --record")
        written = {(f.container, f.sha256): f for f in self.facts.written}
        rows = []
        for container, digest in sorted(record.sha256.items()):
            file = written.get((container, digest))
            where = "" if file is None else f"{code(file.folder)}, {file.file_bytes:,} bytes"
            rows.append([escape(container), code(digest), where])
        recorded = (
            text.table(
                ["container", "sha256 of the weights' file", "in this folder"], rows, numbers=0
            )
            if rows
            else self._gap("No sha256 is recorded yet; the command above records it.")
        )
        facts = [
            ["allocation", code(record.digest)],
            ["checkpoint", code(record.checkpoint)],
            ["importance vectors", code(record.importance)],
            ["finished weights", code(record.weights_digest)] if record.weights_digest else [],
            ["codec", escape(record.codec)],
            ["from a trial of kind", escape(record.kind)],
            ["moe-allocator", escape(self.facts.version)],
        ]
        return self._section(
            title,
            self._note(
                f"In the folder that holds {code(self._study)}, with its checkpoint; the same "
                "bytes on any machine."
            ),
            f"<pre>{escape(chr(10).join(commands))}</pre>",
            recorded,
            f"<h3>This page</h3><pre>{escape(report)}</pre>",
            "<details><summary>Digests and versions</summary>"
            + text.table(["", ""], [f for f in facts if f], numbers=0)
            + "</details>",
        )
