"""lm-eval on a model in memory: two tasks built from held-out documents, and lm-eval's own by name.

In: documents (report split), a tokenizer, a folder; or names of tasks. Out: data and task files in
that folder, which a person can open and `lm_eval --include_path .` can run from there; then metrics
by task.

lm-eval works on text. `Document.text` decodes `ids` and need not encode to the same ids again, so a
perplexity from here differs a little from one over the ids: compare it only with its own kind.

Invariant: for the two tasks nothing is fetched and nothing is written outside the folder.
"""

import contextlib
import difflib
import json
import logging
import math
import os
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import msgspec

from allocator.errors import CalibrationError, VerifyError, first_line
from allocator.files.atomic import write_whole
from allocator.files.progress import waiting

PERPLEXITY = "report_perplexity"
CONTINUATION = "report_continuation"
OWN = (PERPLEXITY, CONTINUATION)
N_CHOICES = 4  # the true continuation and three distractors

_MAIN_METRICS = ("acc_norm", "acc", "exact_match")
"""The metric of lm-eval's own tasks that is shown, the first that a task has; else its first."""
_N_NEAR = 3
_NAMED = re.compile(
    r"""^["']?(?:task|group|tag)["']?:((?:\s*-?\s+["']?[^\s"'#:]+["']?$)+)""", re.MULTILINE
)
"""The names after a key of a task file, each on its line, or one on the line of the key."""
_WORD = re.compile(r"""[^\s"'-][^\s"']*""")

_HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl  # relative to this file
test_split: test
num_fewshot: 0
metadata:
  version: 1
"""
_TASK_FILES = {
    PERPLEXITY: _HEAD
    + """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    CONTINUATION: _HEAD
    + """\
output_type: multiple_choice
doc_to_text: opening
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
""",
}


class Document(Protocol):
    """The part of a document that tasks are written from, see `scoring.documents.Document`."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids, the tokenizer's bos first if the model was trained with one."""

    @property
    def domain(self) -> str:
        """Where the text is from; distractors come from the same domain."""

    @property
    def text(self) -> str | None:
        """The decoded ids without special tokens; decoded here if None."""


def write_tasks(
    documents: Sequence[Document],
    tokenizer: Any,
    folder: Path,
    names: Sequence[str] = OWN,
    *,
    seed: int = 0,
    opening_tokens: int = 64,
    continuation_tokens: int = 32,
) -> list[str]:
    """Writes `<name>.jsonl` and `<name>.yaml` of each task into `folder`; same input, same bytes.

    `report_perplexity` has the text of every document. `report_continuation` asks, per document,
    which of four continuations belongs to its opening: the first `opening_tokens` ids decoded (the
    bos written out if the ids start with it), then the next `continuation_tokens` ids of this
    document or of three others of its domain, drawn and shuffled by `seed`. Documents are
    interleaved by domain, so that any first `limit` of them is balanced.

    Returns:
        The names of the tasks, for `run_tasks`.

    Raises:
        CalibrationError: for `report_continuation`, if a document is too short for an opening and a
            continuation, or a domain has fewer than four different continuations.
    """
    documents = _interleaved(documents)
    rows: dict[str, list[dict[str, Any]]] = {}
    if PERPLEXITY in names:
        rows[PERPLEXITY] = [{"text": _text(d, tokenizer), "domain": d.domain} for d in documents]
    if CONTINUATION in names:
        rows[CONTINUATION] = _questions(
            documents,
            tokenizer,
            seed=seed,
            opening=opening_tokens,
            continuation=continuation_tokens,
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, task_rows in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in task_rows]
        write_whole(folder / f"{name}.jsonl", "".join(lines).encode())
        write_whole(folder / f"{name}.yaml", _TASK_FILES[name].format(name=name).encode())
    return list(rows)


def check_tasks(tokenizer: Any, folder: Path, names: Sequence[str], *, window: int) -> None:
    """Refuses what `run_tasks` would refuse, before there is a model.

    Args:
        tokenizer: the model's.
        folder: where `write_tasks` wrote.
        names: tasks to run.
        window: the model's `config.max_position_embeddings`.

    Raises:
        CalibrationError: if a task has no file here, a question is longer than the window, or the
            tokenizer has no token to begin a text with.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise CalibrationError(
            "lm-eval begins a text with the tokenizer's bos or eos, it has neither; name one in "
            "tokenizer_config.json"
        )
    with _loaded(tokenizer, folder, names, window=window, limit=None):
        pass


def run_tasks(
    model: Any,
    tokenizer: Any,
    folder: Path,
    names: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Returns metrics by task of a transformers causal model, as lm-eval computes them.

    Perplexity: `word_perplexity`, `byte_perplexity`, `bits_per_byte` (lm-eval's), and from the same
    log-likelihoods `token_perplexity` with `token_perplexity_stderr` (delta method of a ratio, over
    documents; Cochran, Sampling Techniques, ch. 6). Multiple choice: `acc` and `acc_norm`
    (log-likelihood per character of the choice), each with `_stderr`. Both have `n_documents`.

    Windows are `config.max_position_embeddings` long; the first token of a text is predicted from
    bos (eos where the tokenizer has no bos), no other special token is added. The tokenizer is left
    with a pad token, which lm-eval needs; the model's mode is put back.

    Args:
        model: a transformers causal language model, on its device.
        tokenizer: the model's tokenizer.
        folder: where `write_tasks` wrote; holds the dataset cache while this runs.
        names: tasks to run.
        batch_size: sequences per forward.
        limit: documents of each task, the first ones; all by default.

    Raises:
        CalibrationError: if a task has no file here, or a question is longer than the window.
        VerifyError: if lm-eval would tie a head that is not the embedding.
    """
    window: int = model.config.max_position_embeddings
    with _loaded(tokenizer, folder, names, window=window, limit=limit) as tasks:
        results = _evaluated(
            model,
            tokenizer,
            tasks,
            batch_size=batch_size,
            limit=limit,
            add_bos=False,  # the bos is the rolling prefix, or written in the opening
        )
        return {
            name: _metrics(results["results"][name], results["samples"][name], tokenizer)
            for name in names
        }


def check_named(names: Sequence[str]) -> None:
    """Refuses names that lm-eval cannot know, before anything is loaded, lm-eval itself included.

    lm-eval parses 14,000 files to list its tasks, which takes it 15 s; the words of these files
    are read in one. A word of another kind passes here, and `load_named` refuses it.

    Args:
        names: of our two tasks or of lm-eval's, or paths of task files (`.yaml`).

    Raises:
        CalibrationError: if a name is no word of a task file, with those near it.
    """
    others = [name for name in names if name not in OWN and not Path(name).is_file()]
    text = _task_files() if others else ""
    for name in others:
        if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            listed = (word for words in _NAMED.findall(text) for word in _WORD.findall(words))
            raise _unknown(name, listed)


def _task_files() -> str:
    """The text of all of lm-eval's task files, and of what they include."""
    package = find_spec("lm_eval")
    folders = [] if package is None else package.submodule_search_locations or []
    paths = sorted(path for folder in folders for path in Path(folder, "tasks").rglob("*"))
    files = (path for path in paths if path.suffix in ("", ".yaml") and path.is_file())
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def _unknown(name: str, known: Iterable[str]) -> CalibrationError:
    near = difflib.get_close_matches(name, {*OWN, *known}, n=_N_NEAR)
    return CalibrationError(
        f"--tasks {name}: no task of lm-eval; "
        + (f"near it are {', '.join(near)}" if near else "`lm_eval ls tasks` lists them")
    )


def load_named(names: Sequence[str]) -> Any:
    """Loads lm-eval's own tasks, groups and tags; their data comes from the Hugging Face hub.

    Args:
        names: as lm-eval lists them, or paths of task files (`.yaml`).

    Returns:
        The tasks, for `run_named`.

    Raises:
        CalibrationError: if a name is unknown, with those near it, or a task's data is not here and
            cannot be fetched.
    """
    import lm_eval.tasks

    with waiting("listing lm-eval's tasks"), _quiet_loggers():
        manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise _unknown(name, manager.all_tasks)
    with waiting("loading lm-eval's tasks"), _quiet_loggers(), _without_bars():
        try:
            return manager.load(list(names))
        except Exception as error:  # of lm-eval, datasets, the hub, or a package that is missing
            raise CalibrationError(
                f"--tasks {','.join(names)}: cannot be loaded ({first_line(error)}); the data of "
                "tasks is on the Hugging Face hub: needed the network once, or a filled cache of it"
            ) from None


def run_named(
    model: Any, tokenizer: Any, tasks: Any, *, batch_size: int = 16, limit: int | None = None
) -> dict[str, float]:
    """Returns one figure per task, and per group that lm-eval averages, as lm-eval computes it.

    A figure is named `<task> <metric>`: `acc_norm` where the task has it, else `acc`,
    `exact_match`, or the task's first metric.

    Args:
        model: as of `run_tasks`.
        tokenizer: the model's; puts special tokens before a text as lm-eval has it do by default.
        tasks: of `load_named`.
        batch_size: sequences per forward.
        limit: questions of each task, the first ones; all by default.

    Raises:
        VerifyError: if lm-eval would tie a head that is not the embedding.
    """
    with _quiet():
        results = _evaluated(
            model, tokenizer, tasks, batch_size=batch_size, limit=limit, add_bos=None
        )
    figures = {}
    for name, result in results["results"].items():
        metrics = {
            key.partition(",")[0]: float(value)
            for key, value in result.items()
            if "," in key and "_stderr" not in key and isinstance(value, int | float)
        }
        main = next((m for m in (*_MAIN_METRICS, *metrics) if m in metrics), None)
        if main is not None:
            figures[f"{name} {main}"] = metrics[main]
    return figures


def _evaluated(
    model: Any, tokenizer: Any, tasks: Any, *, batch_size: int, limit: int | None,
    add_bos: bool | None,
) -> Any:  # fmt: skip
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    _refuse_hidden_tie(model)
    training: bool = model.training
    try:
        # not `simple_evaluate`: it seeds the global generators, asks the hub for the model's commit
        # and runs git and pip to describe the machine
        results = lm_eval.evaluator.evaluate(
            HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                max_length=model.config.max_position_embeddings,
                batch_size=batch_size,
                add_bos_token=add_bos,
            ),
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=1,  # above 0 for the closed-form errors; our metrics need no bootstrap
        )
    finally:
        model.train(training)
    assert results is not None  # None on a rank other than 0 alone
    return results


@contextlib.contextmanager
def _loaded(
    tokenizer: Any, folder: Path, names: Sequence[str], *, window: int, limit: int | None
) -> Iterator[Any]:
    """lm-eval's tasks, each question within the window; offline and quiet in the block."""
    import lm_eval.tasks

    with (
        _offline(),
        _quiet(),
        tempfile.TemporaryDirectory(prefix=".datasets-", dir=_existing(folder, names)) as cache,
    ):
        specs = [_spec(folder, name, cache=cache) for name in names]
        tasks = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False).load(specs)
        for name in names:
            _refuse_truncation(tasks["tasks"][name], tokenizer, window=window, limit=limit)
        yield tasks


def _interleaved(documents: Sequence[Document]) -> list[Document]:
    by_domain: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_domain[document.domain].append(document)
    ranked = [
        (rank, domain, document)
        for domain, members in by_domain.items()
        for rank, document in enumerate(members)
    ]
    return [document for _, _, document in sorted(ranked, key=lambda item: item[:2])]


def _questions(
    documents: Sequence[Document], tokenizer: Any, *, seed: int, opening: int, continuation: int
) -> list[dict[str, Any]]:
    parts = [
        _parts(document, tokenizer, opening=opening, continuation=continuation)
        for document in documents
    ]
    pool: dict[str, list[str]] = defaultdict(list)  # different continuations, in document order
    for document, (_, true) in zip(documents, parts, strict=True):
        if true not in pool[document.domain]:
            pool[document.domain].append(true)
    questions = []
    for index, (document, (start, true)) in enumerate(zip(documents, parts, strict=True)):
        others = [text for text in pool[document.domain] if text != true]
        if len(others) < N_CHOICES - 1:
            raise CalibrationError(
                f"domain {document.domain!r} has {len(others) + 1} different continuations, needed "
                f"{N_CHOICES}; give it more documents, or leave the domain out"
            )
        rng = random.Random(f"{seed}/{index}")
        choices = [true, *rng.sample(others, N_CHOICES - 1)]
        rng.shuffle(choices)
        questions.append(
            {
                "opening": start,
                "choices": choices,
                "answer": choices.index(true),
                "domain": document.domain,
            }
        )
    return questions


def _parts(
    document: Document, tokenizer: Any, *, opening: int, continuation: int
) -> tuple[str, str]:
    ids = document.ids
    has_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
    first = 1 if has_bos else 0
    end = first + opening + continuation
    if len(ids) < end:
        raise CalibrationError(
            f"a document of domain {document.domain!r} has {len(ids)} ids, needed {end} for an "
            f"opening of {opening} and a continuation of {continuation}; shorten these, or leave "
            "the document out"
        )
    # a cut inside a character decodes to U+FFFD at the end: that character goes to the continuation
    start = _decode(tokenizer, ids[first : first + opening]).rstrip("\ufffd")
    whole = _decode(tokenizer, ids[first:end]).rstrip("\ufffd")
    if not start.strip() or not whole.startswith(start) or whole == start:
        raise CalibrationError(
            f"a document of domain {document.domain!r} has no text on one side of its cut after "
            f"{opening} ids ({whole!r}); leave it out, or cut elsewhere"
        )
    return (tokenizer.bos_token if has_bos else "") + start, whole[len(start) :]


def _text(document: Document, tokenizer: Any) -> str:
    if document.text is not None:
        return document.text
    return _decode(tokenizer, document.ids)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def _existing(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        for path in (folder / f"{name}.yaml", folder / f"{name}.jsonl"):
            if not path.is_file():
                raise CalibrationError(
                    f"task {name!r}: {path} is missing; write it with write_tasks"
                )
    return folder


def _spec(folder: Path, name: str, *, cache: str) -> dict[str, Any]:
    spec: dict[str, Any] = msgspec.yaml.decode((folder / f"{name}.yaml").read_bytes())
    data = str((folder / f"{name}.jsonl").resolve())
    return spec | {"dataset_kwargs": {"data_files": {"test": data}, "cache_dir": cache}}


def _refuse_hidden_tie(model: Any) -> None:
    """lm-eval calls `tie_weights()`, which would overwrite a head that was quantized on its own."""
    head = model.get_output_embeddings()
    if (
        getattr(model.config, "tie_word_embeddings", False)
        and head is not None
        and head.weight is not model.get_input_embeddings().weight
    ):
        raise VerifyError(
            "the model's config has tie_word_embeddings = true, but its head is not its embedding; "
            "lm-eval would tie them: set config.tie_word_embeddings = False"
        )


def _refuse_truncation(task: Any, tokenizer: Any, *, window: int, limit: int | None) -> None:
    """lm-eval would cut a long question from the left and say so only in its log."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for index, question in enumerate(list(task.test_docs())[:limit]):
        for choice in question["choices"]:
            text = question["opening"] + choice
            n_tokens = len(tokenizer.encode(text, add_special_tokens=False))
            if n_tokens > window + 1:  # the last token is predicted, not read
                raise CalibrationError(
                    f"task {task.task_name!r}, question {index} has {n_tokens} tokens, the window "
                    f"{window}; write the task with a shorter opening or continuation"
                )


def _metrics(
    result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], tokenizer: Any
) -> dict[str, float]:
    metrics = {
        key.replace(",none", ""): float(value)  # lm-eval names them "<metric>,<filter>"
        for key, value in result.items()
        if "," in key and isinstance(value, float)
    }
    metrics["n_documents"] = float(len(samples))
    if "byte_perplexity" in metrics:
        nats = [-float(sample["filtered_resps"][0]) for sample in samples]
        tokens = [
            len(tokenizer.encode(sample["doc"]["text"], add_special_tokens=False))
            for sample in samples
        ]
        metrics |= _token_perplexity(nats, tokens)
    return metrics


def _token_perplexity(nats: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    n, loss = len(nats), sum(nats) / sum(tokens)
    perplexity = math.exp(loss)
    if n < 2:
        return {"token_perplexity": perplexity}
    squares = sum((a - loss * t) ** 2 for a, t in zip(nats, tokens, strict=True))
    loss_stderr = math.sqrt(n / (n - 1) * squares) / sum(tokens)
    return {
        "token_perplexity": perplexity,
        "token_perplexity_stderr": perplexity * loss_stderr,
    }


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The variables for what is imported from here on, the constants for what already was."""
    import datasets.config
    import huggingface_hub.constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    constants = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        *((datasets.config, name) for name in names),
    ]
    before = {name: os.environ.get(name) for name in names}
    before_constants = [(owner, name, getattr(owner, name)) for owner, name in constants]
    try:
        os.environ.update(dict.fromkeys(names, "1"))
        for owner, name in constants:
            setattr(owner, name, True)
        yield
    finally:
        for owner, name, constant in before_constants:
            setattr(owner, name, constant)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, prints or notes; errors are still raised.

    lm-eval's rolling log-likelihood shows a bar per batch whatever it is told, so both streams go
    to null meanwhile.
    """
    with (
        _quiet_loggers(),
        open(os.devnull, "w", encoding="utf-8") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        yield


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    names = ("lm_eval", "datasets", "transformers", "huggingface_hub")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
