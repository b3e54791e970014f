"""lm-eval's figures against our own forward passes, on the trained reference model."""

import hashlib
import json
import logging
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets.config
import lm_eval.tasks
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from allocator.errors import CalibrationError, VerifyError
from allocator.evaluation import lm_eval_tasks
from allocator.evaluation.lm_eval_tasks import (
    CONTINUATION,
    OWN,
    PERPLEXITY,
    check_named,
    load_named,
    run_named,
    run_tasks,
    write_tasks,
)

ROOT = Path(__file__).parents[2] / "studies" / "reference"
N_DOCUMENTS = 32
WINDOW = 256
BOS = 0


@dataclass(frozen=True)
class Document:
    ids: tuple[int, ...]
    domain: str
    text: str | None


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small forwards: two threads on shared cores wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def documents():
    with (ROOT / "generated" / "report.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    documents = [Document(tuple(row["ids"]), row["domain"], row["text"]) for row in rows]
    return [
        document
        for domain in ("code_c", "de", "en_dict", "zh")
        for document in [d for d in documents if d.domain == domain][: N_DOCUMENTS // 4]
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model")


def load():
    return AutoModelForCausalLM.from_pretrained(ROOT / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def folder(documents, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    assert write_tasks(documents, tokenizer, folder) == [PERPLEXITY, CONTINUATION]
    return folder


@pytest.fixture(scope="module")
def run(model, tokenizer, folder):
    """Metrics of the original, and what happened on the way."""
    return watched(lambda: run_tasks(model, tokenizer, folder, [PERPLEXITY, CONTINUATION]), folder)


def watched(call, folder):
    """The value of `call`, with every file written outside `folder` and every connection made."""
    events, on = [], True

    def hook(event, args):
        if not on:
            return
        if event in ("socket.connect", "socket.getaddrinfo"):
            events.append((event, *args))
        elif event == "open" and isinstance(args[0], str | bytes | Path):
            path, mode, flags = args
            writes = set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)
            if writes:
                events.append((event, os.fsdecode(path)))
        elif event in ("os.mkdir", "os.rename"):
            events.append((event, os.fsdecode(args[0])))

    sys.addaudithook(hook)  # stays for the process: switched off below
    try:
        value = call()
    finally:
        on = False
    allowed = (str(folder), os.devnull)
    return value, [e for e in events if e[0].startswith("socket") or not e[1].startswith(allowed)]


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


@torch.no_grad()
def log_probs(model, ids):
    """Log-probability of `ids[1:]`, each given all before it: one forward, no batch, no padding."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def text_log_prob(model, tokenizer, text):
    """(nats, tokens): every block of `WINDOW` tokens is predicted once, after bos or one token; a
    shorter last block after all that fits into the window."""
    ids = [BOS, *tokenizer(text, add_special_tokens=False).input_ids]
    n_tokens, total, done = len(ids) - 1, 0.0, 0
    while done < n_tokens:
        end = min(done + WINDOW, n_tokens)
        scored = log_probs(model, ids[max(0, end - WINDOW) : end + 1])[-(end - done) :]
        total, done = total + scored.sum().item(), end
    return total, n_tokens


def test_perplexity_is_that_of_our_own_forward(run, model, tokenizer, folder):
    metrics = run[0][PERPLEXITY]
    texts = [row["text"] for row in rows(folder, PERPLEXITY)]
    totals = [text_log_prob(model, tokenizer, text) for text in texts]
    nats = -sum(total for total, _ in totals)
    tokens = [n for _, n in totals]
    assert len(texts) == N_DOCUMENTS == metrics["n_documents"]
    assert metrics["token_perplexity"] == pytest.approx(math.exp(nats / sum(tokens)), rel=1e-4)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(nats / n_bytes), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-4)
    assert 10 < metrics["token_perplexity"] < 60  # 23.5 on real text, sampled text is harder

    # the delta-method error against the jackknife
    left_out = [math.exp((nats + total) / (sum(tokens) - n)) for total, n in totals]
    mean = sum(left_out) / len(left_out)
    variance = (len(left_out) - 1) / len(left_out) * sum((x - mean) ** 2 for x in left_out)
    assert metrics["token_perplexity_stderr"] == pytest.approx(math.sqrt(variance), rel=0.05)


def test_text_beyond_the_window_is_scored_in_windows(model, tokenizer, documents, tmp_path):
    long = [
        Document(a.ids, a.domain, a.text + b.text + c.text)
        for a, b, c in zip(documents[:4], documents[4:8], documents[8:12], strict=True)
    ]
    write_tasks(long, tokenizer, tmp_path)
    metrics = run_tasks(model, tokenizer, tmp_path, [PERPLEXITY], limit=2)[PERPLEXITY]
    totals = [text_log_prob(model, tokenizer, d.text) for d in long[:2]]
    assert min(n for _, n in totals) > 2 * WINDOW
    expected = math.exp(-sum(t for t, _ in totals) / sum(n for _, n in totals))
    assert metrics["token_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert metrics["n_documents"] == 2


def test_accuracy_is_that_of_our_own_forward_and_beats_chance(run, model, tokenizer, folder):
    metrics = run[0][CONTINUATION]
    questions = rows(folder, CONTINUATION)
    right, right_per_character = [], []
    for question in questions:
        # lm-eval's split: trailing spaces of the opening go to the continuation
        n_opening = len(tokenizer(question["opening"].rstrip()).input_ids)
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(question["opening"] + choice).input_ids
            assert ids[0] == BOS
            assert ids.count(BOS) == 1
            scores.append(log_probs(model, ids)[n_opening - 1 :].sum().item())
        per_character = [s / len(c) for s, c in zip(scores, question["choices"], strict=True)]
        right.append(scores.index(max(scores)) == question["answer"])
        best = per_character.index(max(per_character))
        right_per_character.append(best == question["answer"])
    n = len(questions)
    assert n == N_DOCUMENTS
    assert metrics["acc"] == pytest.approx(sum(right) / n)
    assert metrics["acc_norm"] == pytest.approx(sum(right_per_character) / n)
    p = sum(right) / n
    assert metrics["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert metrics["acc"] > 0.25 + 3 * math.sqrt(0.25 * 0.75 / n)  # three errors of guessing


def test_questions_are_what_they_say(folder, tokenizer, documents):
    questions = rows(folder, CONTINUATION)
    true = {}
    for document in documents:
        whole = tokenizer.decode(document.ids[1:97])
        matches = [
            q for q in questions if whole.startswith(q["opening"].removeprefix(tokenizer.bos_token))
        ]
        (question,) = [q for q in matches if q["domain"] == document.domain]
        answer = question["choices"][question["answer"]]
        opening = question["opening"].removeprefix(tokenizer.bos_token)
        assert (opening + answer).rstrip("\ufffd") == whole.rstrip("\ufffd")
        true[answer] = document.domain
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert {true[choice] for choice in question["choices"]} == {question["domain"]}
    assert {q["answer"] for q in questions} == {0, 1, 2, 3}
    assert len({q["domain"] for q in questions[:4]}) == 4  # interleaved


def test_a_damaged_model_is_worse(run, tokenizer, folder, model):
    damaged = load()
    with torch.no_grad():
        for layer in damaged.model.layers[1:]:
            n_experts = layer.mlp.experts.down_proj.shape[0]
            layer.mlp.experts.down_proj[: n_experts // 2] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    worse = run_tasks(damaged, tokenizer, folder, [PERPLEXITY], limit=8)[PERPLEXITY]
    model.train()
    same = run_tasks(model, tokenizer, folder, [PERPLEXITY], limit=8)[PERPLEXITY]
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert worse["token_perplexity"] > 1.05 * same["token_perplexity"]
    assert worse["bits_per_byte"] > same["bits_per_byte"]


def test_same_input_gives_the_same_files(documents, tokenizer, tmp_path, folder):
    def digests(folder):
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir())
        }

    again, other = tmp_path / "again", tmp_path / "other"
    write_tasks(documents, tokenizer, again)
    write_tasks(documents, tokenizer, other, seed=1)
    first = digests(folder)
    assert len(first) == 4  # two data files, two task files; the cache and .part files are gone
    assert digests(again) == first
    changed = {name for name, digest in digests(other).items() if digest != first[name]}
    assert changed == {f"{CONTINUATION}.jsonl"}


def test_nothing_is_fetched_or_written_elsewhere(run):
    assert run[1] == []


def test_the_watch_sees_writes_and_connections(tmp_path):
    import socket

    def misbehave():
        (tmp_path / "stray").write_text("x")
        with socket.socket() as client, pytest.raises(OSError, match="refused"):
            client.connect(("127.0.0.1", 1))

    assert [event[0] for event in watched(misbehave, tmp_path / "folder")[1]] == [
        "open",
        "socket.connect",
    ]


def test_it_is_quiet_and_leaves_the_process_as_it_was(model, tokenizer, folder, capfd, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)

    def state():
        return (
            os.environ.get("HF_HUB_OFFLINE"),
            os.environ.get("HF_DATASETS_OFFLINE"),
            huggingface_hub.constants.HF_HUB_OFFLINE,
            datasets.config.HF_DATASETS_OFFLINE,
            logging.getLogger("lm_eval").level,
            torch.random.get_rng_state().tolist(),
        )

    before = state()
    run_tasks(model, tokenizer, folder, [CONTINUATION], limit=2)
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_errors_name_the_way_out(documents, model, tokenizer, tmp_path, folder):
    with pytest.raises(CalibrationError, match="needed 401 for an opening of 300"):
        write_tasks(documents, tokenizer, tmp_path, opening_tokens=300, continuation_tokens=100)
    with pytest.raises(CalibrationError, match="3 different continuations, needed 4"):
        write_tasks(documents[:3], tokenizer, tmp_path)
    assert write_tasks(documents[:3], tokenizer, tmp_path / "one", [PERPLEXITY]) == [PERPLEXITY]
    assert {p.stem for p in (tmp_path / "one").iterdir()} == {PERPLEXITY}
    with pytest.raises(CalibrationError, match=r"task 'nothing': .* write it with write_tasks"):
        run_tasks(model, tokenizer, folder, ["nothing"])
    long = [Document(d.ids * 2, d.domain, d.text) for d in documents[:4]]
    write_tasks(long, tokenizer, tmp_path, opening_tokens=300, continuation_tokens=100)
    with pytest.raises(CalibrationError, match=r"question 0 has .* tokens, the window 256"):
        run_tasks(model, tokenizer, tmp_path, [CONTINUATION], limit=1)


@pytest.fixture
def task_file(folder, tmp_path, monkeypatch):
    """The continuations as a stranger's task file, and an lm-eval that lists nothing else."""
    text = (folder / f"{CONTINUATION}.yaml").read_text()
    data = folder / f"{CONTINUATION}.jsonl"
    path = tmp_path / "mine.yaml"
    text = text.replace(f"task: {CONTINUATION}", "task: mine").replace(data.name, str(data))
    path.write_text(text)
    manager = partial(lm_eval.tasks.TaskManager, include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return path


def test_a_named_task_has_the_figure_of_lm_eval(model, tokenizer, folder, task_file, capfd):
    ours = run_tasks(model, tokenizer, folder, [CONTINUATION], limit=3)[CONTINUATION]
    for name in ("mine", str(task_file)):
        figures = run_named(model, tokenizer, load_named([name]), limit=3)
        assert figures == {"mine acc_norm": ours["acc_norm"]}
    assert capfd.readouterr() == ("", "")


def test_a_name_that_no_task_file_has_is_refused_before_lm_eval_is_loaded(
    task_file, tmp_path, monkeypatch
):
    """Names, groups and tags pass, also where an included file without a suffix has them."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/_template").write_text(
        'tag:\n  - one_tag\n  - "other_tag"\n"task": shared\n'
    )
    (tmp_path / "tasks/a.yaml").write_text(
        "group: \u00e9tudes\ntask:\n- first-task\nmetric: score\n"
    )
    place = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(lm_eval_tasks, "find_spec", {"lm_eval": place}.get)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", None)
    check_named(
        [*OWN, "one_tag", "other_tag", "shared", "\u00e9tudes", "first-task", str(task_file)]
    )
    for name, near in {
        "one_tug": "one_tag", "first-tusk": "first-task", "first": "first-task", "shard": "shared",
        "report_continuations": "report_continuation", "scoor": None,
    }.items():  # fmt: skip
        says = f"near it are .*{near}" if near else "`lm_eval ls tasks` lists them"
        with pytest.raises(CalibrationError, match=f"^--tasks {name}: no task of lm-eval; {says}"):
            check_named(["one_tag", name])


def test_named_tasks_that_cannot_be_run_are_one_line(task_file):
    with pytest.raises(CalibrationError, match=r"--tasks mina: no task of lm-eval; .* mine$"):
        load_named(["mina"])
    with pytest.raises(CalibrationError, match=r"continuations: .* report_continuation$"):
        load_named(["report_continuations"])
    task_file.write_text(task_file.read_text().replace(".jsonl", ".gone"))
    with pytest.raises(CalibrationError, match=r"--tasks mine: cannot be loaded .* Hugging Face"):
        load_named(["mine"])


def test_a_head_of_its_own_is_not_tied_away(tokenizer, folder):
    untied = load()
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(VerifyError, match=r"set config\.tie_word_embeddings = False"):
        run_tasks(untied, tokenizer, folder, [CONTINUATION], limit=1)
    untied.config.tie_word_embeddings = False
    run_tasks(untied, tokenizer, folder, [CONTINUATION], limit=1)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
