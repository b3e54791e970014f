"""The report of a study: its figures against the study's own, and what it leaves out."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import optuna
import pytest

from allocator import api
from allocator.app.held_out_file import HELD_OUT, HeldOut, HeldOutRow, HeldOutSplit
from allocator.app.tables import front_table
from allocator.app.trial_table import trials_table
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord, Finishing
from allocator.errors import OutputError, SpaceError, StudyError
from allocator.files.checksums import seal
from allocator.formats import format_named
from allocator.study.storages import open_storage

REFERENCE = Path(__file__).parents[2] / "studies/reference"
VOID = {"meta", "br", "line", "circle", "rect", "path", "polygon"}


class Page(HTMLParser):
    """A page taken apart; every element must be closed where it was opened."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text()
        self.open, self.elements, self.titles, self.words = [], [], [], []
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if "script" in self.open or "style" in self.open:
            return
        (self.titles if self.open[-1:] == ["title"] else self.words).append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def commands(self):
        return re.findall(r"<code>(allocator [^<]+)</code>", self.html)


def read(path):
    """A page that loads nothing, and in which every number is one."""
    page = Page(path)
    assert not re.search(r"\b(nan|inf|infinity|none)\b", page.text + " ".join(page.titles), re.I)
    assert "//" not in page.html
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "srcset", "action"}, tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert tag not in ("link", "img", "iframe", "object", "embed")
        drawn = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"}
        for name in drawn & attributes.keys():
            assert float(attributes[name]) > -1e4
    assert "url(" not in page.html
    assert "@import" not in page.html
    return page


def made(study, tmp_path, **options):
    return read(api.report(study, out=tmp_path / "report.html", **options))


# -- a study of many layers, from its files alone


def record_of(layers, experts, retained, **changes):
    rng = np.random.default_rng(0)
    roles = ("attention.q", "attention.k", "attention.v", "attention.o",
             "experts.gate", "experts.up", "experts.down", "shared.down")  # fmt: skip
    formats = ("IQ1_S", "IQ2_XXS", "IQ3_S", "Q4_K", "Q6_K", "Q8_0")
    chosen = {f"layers.{x}.{r}": formats[rng.integers(6)] for x in range(layers) for r in roles}
    chosen |= {"embedding": "Q6_K", "head": "Q8_0"}
    kept = {
        x: tuple(sorted(rng.choice(experts, retained, replace=False).tolist()))
        for x in range(layers)
    }
    decision = Allocation.of(target="gguf", retained=kept, formats=chosen, experts_used=8)
    sizes = {"budget": 9_000_000, "encoded": 8_000_000, "kept": 1000, "overhead": 500}
    return AllocationRecord(
        name="pick", kind="proposal", allocation=decision.to_json(), digest=decision.digest,
        checkpoint="c" * 64, importance="e" * 64, codec="a codec", effective_bits=2.3456,
        bytes={**sizes, "file": 8_001_500}, loss={"search": 0.25, "selection": 0.26}, **changes,
    )  # fmt: skip


def trial(number, kind="proposal", state="COMPLETE", loss=0.3, nbytes=8_000_000):
    return {
        "trial": number, "kind": kind, "state": state, "bytes": nbytes, "file_bytes": nbytes,
        "effective_bits": nbytes / 3.4e6, "loss": loss, "predicted": loss * 0.9, "tokens": 64,
        "top1": 0.7, "experts": "8 8",
    }  # fmt: skip


def row(name, kind, nbytes, kl, allocation="", weights=""):
    kl_of = [kl * f for f in (0.5, 1.0, 1.5)]
    return HeldOutRow(
        name=name, kind=kind, allocation=allocation or name, weights=weights, bits=nbytes / 3.4e6,
        bytes=nbytes, experts="", kl=kl, perplexity=9.5 + kl, top1=1 - kl / 2, kl_of=kl_of,
        nll_of=[2.2 + kl] * 3, top1_of=[1 - kl / 2] * 3, file_bytes=nbytes,
    )  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """`write(name, record, trials, rows)`: a study folder whose checkpoint is elsewhere."""

    def write(name="study", record=None, trials=(), rows=()):
        folder = tmp_path / name
        (folder / "allocations").mkdir(parents=True)
        (folder / "study.toml").write_text(
            'schema = 1\ncheckpoint = "elsewhere"\ntarget = "gguf"\n[budget]\nweights = 9000000\n'
            '[calibration]\ndocuments = "d.jsonl"\nreport = "r.jsonl"\n'
        )
        if record is not None:
            (folder / "allocations/pick.json").write_bytes(record.to_bytes())
        if trials:
            lock = {"budget": "9000000 (weights)", "sampler": "auto"}
            chosen = [t for t in trials if t["state"] == "COMPLETE"][:1]
            plain = {"schema": 1, "split": "search", "lock": lock}
            (folder / "front.json").write_bytes(
                seal({**plain, "front": chosen, "trials": list(trials)})
            )
        if rows:
            split = HeldOutSplit("report", "d", [10, 10, 20], ["code", "code", "en"], list(rows))
            (folder / HELD_OUT).write_bytes(seal(HeldOut("c" * 64, "gguf", [split])))
        return folder

    return write


def test_sixty_layers_and_removed_experts_from_files_alone(write, tmp_path):
    record = record_of(60, 128, 96)
    page = made(write(record=record, trials=[trial(0, "knapsack"), trial(1)]), tmp_path)
    cells = [t for t in page.titles if re.match(r"layer \d+, .* bits$", t)]
    groups = [g for g in record.decision.format_of if g.startswith("layers.")]
    assert len(cells) == len(groups) == 480
    bits = format_named(record.decision.format_of["layers.59.experts.up"]).bits
    assert any(t.startswith("layer 59, experts.up: ") and f" {bits:.2f} bits" in t for t in cells)
    assert "MoE layer keeps 96 routed experts" in page.text
    assert "cannot be read" in page.text
    assert {"allocator evaluate study", "allocator profile study",
            "allocator finish study/allocations/pick.json"} <= set(page.commands)  # fmt: skip
    assert len(page.html) < 400_000


def test_held_out_figures_and_the_distance_to_baselines(write, tmp_path):
    finished = Finishing({"parts": ["codes"]}, "i", {"search": 0.25}, {"search": 0.2})
    record = record_of(4, 8, 8).finished_with("f" * 64, finished)
    rows = [
        row("original", "original", 50_000_000, 0.0),
        row("smaller", "baseline", 6_000_000, 0.9),
        row("larger", "baseline", 10_000_000, 0.1),
        row("pick", "allocation", 8_000_000, 0.24, record.digest, "f" * 64),
        row("pick, unfinished", "allocation", 8_000_000, 0.27, record.digest),
    ]
    page = made(write(record=record, rows=rows), tmp_path)
    # halfway between two baselines, on a log scale: sqrt(.9 * .1) = .3; document by document, too
    assert "0.80×" in page.text
    assert "[0.80, 0.80]; the best of its size, between smaller and larger" in page.text
    mean = (10 * 0.12 + 10 * 0.24 + 20 * 0.36) / 40
    assert f"the pick, finished: {mean:.4f} [" in " ".join(page.titles)
    assert f"{0.24 / 0.27:.2f}×" in page.text  # what finishing brought
    assert "report split, held out" in page.text
    assert sum("the pick, finished, en: 0.3600" in t for t in page.titles) == 1


def test_names_are_escaped(write, tmp_path):
    evil = "<script>alert(1)<&"
    rows = [row(evil, "baseline", 6_000_000, 0.9), row("pick", "allocation", 8_000_000, 0.2)]
    record = record_of(2, 8, 8)
    rows[1] = msgspec.structs.replace(rows[1], allocation=record.digest)
    study = write("a<img onerror=1>\"'&", record, [trial(0, evil), trial(1, "</svg>")], rows)
    page = made(study, tmp_path)
    assert page.html.count("<script") == 1
    assert "<img" not in page.html
    assert any(evil in t for t in page.titles)
    assert study.name in page.text


def test_the_same_study_gives_the_same_bytes_wherever_it_lies(write, tmp_path):
    study = write(record=record_of(3, 8, 6), trials=[trial(0), trial(1, "Q2_K", loss=0.4)])
    first = api.report(study).read_bytes()
    assert api.report(study).read_bytes() == first
    moved = shutil.copytree(study, tmp_path / "other place" / study.name)
    assert api.report(moved).read_bytes() == first
    assert {p.name for p in study.iterdir()} == {
        "allocations", "front.json", "report.html", "study.toml",
    }  # fmt: skip


def test_a_study_without_anything_is_refused(write, tmp_path):
    study = write()
    with pytest.raises(StudyError, match="nothing to report yet"):
        api.report(study)
    with pytest.raises(SpaceError, match=r"none\.json"):
        api.report(study, allocation=study / "none.json")
    with pytest.raises(OutputError, match=r"--out .*: no regular file"):
        api.report(write("other", record_of(1, 8, 8)), out=tmp_path)
    assert not (study / "report.html").exists()


def test_an_unfinished_search_shows_its_trials(write, tmp_path):
    study = write(trials=[trial(0), trial(1, state="PRUNED"), trial(2, state="FAIL", loss=np.nan)])
    text = (study / "front.json").read_text()
    assert "null" in text or "NaN" in text
    page = made(study, tmp_path)
    assert "the search has not ended" in page.text
    assert "1 scored in full, 1 lost their race" in page.text
    assert "The least KL so far is 0.3000 nats per token on the search split" in page.text
    assert set(page.commands) <= {"allocator search study", "allocator profile study"}


def test_a_device_budget_and_experts_in_parts(write, tmp_path):
    """Memory as the record has it; a group in two formats has the mean of their bits."""
    record = record_of(2, 8, 4)
    plain = json.loads(json.dumps(record.allocation))
    plain["formats"]["layers.1.experts.up"] = "IQ1_S:0+Q4_K:1,2,3"
    decision = Allocation.from_json(plain)
    memory = dict(weights=2**20, kv_cache=2**19, compute=2**18, overhead=2**17, reserve=0)
    record = msgspec.structs.replace(
        record, allocation=plain, digest=decision.digest,
        workload={"context": 2048, "sequences": 3, "reserve": 0},
        bytes=record.bytes | {f"device_{k}": n for k, n in memory.items()}
        | {"device_total": sum(memory.values())},
    )  # fmt: skip
    page = made(write(record=record), tmp_path)
    assert "3 sequences of 2,048 tokens" in page.text
    assert "1.88 MiB" in page.text  # (1 + 1/2 + 1/4 + 1/8) MiB
    bits = (format_named("IQ1_S").bits + 3 * format_named("Q4_K").bits) / 4
    assert f"layer 1, experts.up: IQ1_S*1+Q4_K*3, {bits:.2f} bits" in page.titles


# -- real studies


def test_the_reference(tmp_path):
    page = made(REFERENCE, tmp_path, cache=tmp_path / "cache")
    record = AllocationRecord.read(REFERENCE / "allocations/pick.json")
    trials = front_table(REFERENCE)
    named = [t for t in page.titles if re.match(r"trial \d+, ", t) and "predicted" not in t]
    assert sorted(named) == sorted(2 * list(dict.fromkeys(named)))  # over size, and in order
    assert {int(t.split()[1].rstrip(",")) for t in named} == set(trials["trial"])
    assert f"{record.bytes['file']:,} bytes in the file" in page.text
    assert record.sha256["gguf"] in page.text
    finished = record.finished.after["selection"]
    assert f"{finished:.5f}" in page.text
    assert "allocator reproduce reference/allocations/pick.json" in page.html
    roles = dict(re.findall(r"<tr><td>([\w.]+)</td><td><span class=\"bar\">.*?<td class=\"n\">"
                            r"[\d.]+ [KM]iB</td><td class=\"n\">([\d.]+)%", page.html))  # fmt: skip
    pick = json.loads((REFERENCE / "allocations/pick.json").read_text())["allocation"]["formats"]
    assert {name.split(".", 2)[-1] for name in pick} <= roles.keys()


@pytest.fixture(scope="module")
def options(study_cache):
    return {"cache": study_cache, "threads": 1}


def test_a_finished_study_in_a_database(finished_study, options, tmp_path, opened):
    """Trials, KL by domain, routing and predictions are the study's own."""
    study = shutil.copytree(finished_study, tmp_path / "study")
    url = f"sqlite:///{tmp_path}/trials.db"
    optuna.copy_study(
        from_study_name="study", from_storage=open_storage(None, study), to_storage=opened(url),
        to_study_name="study",
    )  # fmt: skip
    page = made(study, tmp_path, **options)
    for name in ("journal", "front.json"):
        (study / name).unlink()
    assert made(study, tmp_path, storage=url, **options).html == page.html
    table = trials_table(optuna.load_study(study_name="study", storage=opened(url)))
    for t in table[table["state"] == "COMPLETE"].to_dict("records"):
        shown = f"trial {t['trial']}, {t['kind']}: predicted "
        (title,) = [x for x in page.titles if x.startswith(shown)]
        numbers = re.findall(r"[\d.]+(?:e-\d+)?", title.removeprefix(shown))
        assert [float(n.rstrip(".")) for n in numbers] == pytest.approx(
            [t["predicted"], t["loss"]], rel=2e-3
        )
    counts = api.profile(study, **options).counts
    routed = re.findall(r"layer (\d+), expert (\d+): \w+, ([\d,]+) tokens", " ".join(page.titles))
    assert {(int(x), int(e), int(n.replace(",", ""))) for x, e, n in routed} == {
        (x, e, n) for x, tokens in counts.items() for e, n in enumerate(tokens)
    }
    assert "What bits are worth" in page.text
    with pytest.raises(StudyError, match="no study yet in sqlite"):
        api.report(study, storage=f"sqlite:///{tmp_path}/empty.db", **options)


# -- in a browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_a_browser_window(write, tmp_path, width):
    """The page in a frame of a phone's and a screen's width, as Chromium lays it out."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    study = write(record=record_of(60, 128, 96), trials=[trial(0), trial(1, "Q2_K", loss=0.4)])
    report = api.report(study, out=tmp_path / "report.html")
    probe = (
        "<script>var d = document.documentElement; document.title = 'measured ' + "
        "d.scrollWidth + ' ' + d.clientWidth + ' ' + document.querySelectorAll('[data-tip]').length"
        "</script></body>"
    )
    inner = report.read_text().replace("</body>", probe)
    report.write_text(inner)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="report.html" width="{width}" height="3000" onload="document.title = '
        'this.contentDocument.title; document.body.append(document.title)"></iframe>'
    )
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         "--allow-file-access-from-files", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    scrolls, shown, tips = map(int, re.search(r"measured (\d+) (\d+) (\d+)", done.stdout).groups())
    assert scrolls <= shown <= width
    assert tips > 480
