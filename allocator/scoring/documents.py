"""Calibration text: documents of token ids, in disjoint splits.

In: JSON-lines files whose records hold `ids` (scored as they are), or `text` (tokenised with the
checkpoint's tokenizer, each text preceded by what that puts there itself, concatenated, cut in
windows), and optionally a `domain`. Out: documents, interleaved over their domains so that every
prefix is representative. Invariant: a split never holds a document of another split.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from allocator.checkpoint.tokenizer import Tokenizer
from allocator.errors import CalibrationError, reason


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that are scored together.

    Attributes:
        ids: token ids, from the beginning of a text or cut out of one.
        domain: where it is from; `""` if unknown.
        text: for reading and lm-eval; need not re-encode to `ids`.
    """

    ids: tuple[int, ...]
    domain: str = ""
    text: str | None = None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSON-lines file.

    Raises:
        CalibrationError: if it cannot be read, naming the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CalibrationError(f"{path}:{number}: no JSON ({error})") from None
                if not isinstance(record, dict) or not ("ids" in record or "text" in record):
                    raise CalibrationError(f"{path}:{number}: needed an object with ids or text")
                yield record
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path}: cannot be read ({reason(error)})") from None


def read_documents(path: Path, *, vocab_size: int) -> list[Document]:
    """Reads the documents of a file whose records hold `ids`, in file order.

    Raises:
        CalibrationError: if a record has no usable ids.
    """
    documents = []
    for number, record in enumerate(read_records(path), 1):
        ids = record.get("ids")
        good = isinstance(ids, list) and len(ids) > 1
        if not good or not all(type(i) is int and 0 <= i < vocab_size for i in ids or ()):
            raise CalibrationError(
                f"{path}:{number}: needed ids, a list of 2 or more numbers below {vocab_size}"
            )
        domain, text = str(record.get("domain", "")), record.get("text")
        documents.append(Document(tuple(ids or ()), domain, text))
    if not documents:
        raise CalibrationError(f"{path}: no documents")
    return documents


def read_windows(path: Path, tokenizer: Tokenizer, *, window: int) -> list[Document]:
    """Reads real text in windows: per domain, texts are concatenated and cut.

    Args:
        path: records with `text` and optionally `domain`.
        tokenizer: the checkpoint's; it puts bos before each text, or does not.
        window: tokens per document; a last piece that is shorter is left out.

    Raises:
        CalibrationError: if the tokenizer is damaged, or the text shorter than one window.
    """
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(tokenizer.text)
        prefix = tokenizer.prefix
    except Exception as error:  # the library raises this very class
        raise CalibrationError(
            f"{tokenizer.path}/tokenizer.json: cannot be read ({error}); fetch the file again"
        ) from None
    streams: dict[str, list[int]] = {}
    for number, record in enumerate(read_records(path), 1):
        if not isinstance(record.get("text"), str):
            raise CalibrationError(f"{path}:{number}: needed text, to be cut in windows")
        stream = streams.setdefault(str(record.get("domain", "")), [])
        stream += [*prefix, *library.encode(record["text"], add_special_tokens=False).ids]
    documents = [
        Document(tuple(stream[start : start + window]), domain)
        for domain, stream in streams.items()
        for start in range(0, len(stream) - window + 1, window)
    ]
    if not documents:
        raise CalibrationError(f"{path}: less text than one window of {window} tokens")
    return documents


def every_third(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Splits every domain in two thirds, and a third: the third, sixth, ... document."""
    seen: dict[str, int] = {}
    parts: tuple[list[Document], list[Document]] = [], []
    for document in documents:
        seen[document.domain] = seen.get(document.domain, 0) + 1
        parts[seen[document.domain] % 3 == 0].append(document)
    return parts


def interleaved(documents: Sequence[Document]) -> list[Document]:
    """Orders documents so that they come from the domains in turn."""
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    rounds = zip_longest(*by_domain.values())
    return [document for row in rounds for document in row if document is not None]


def batches(
    documents: Sequence[Document], start: int, stop: int, *, n_tokens: int
) -> Iterator[list[int]]:
    """Yields indices of `documents[start:stop]` in runs of one length, `n_tokens` each at most."""
    batch: list[int] = []
    for i in range(start, stop):
        length = len(documents[i].ids)
        full = (len(batch) + 1) * length > n_tokens
        if batch and (full or len(documents[batch[0]].ids) != length):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def digest(documents: Sequence[Document]) -> str:
    """Returns the sha256 of the ids, in order."""
    total = hashlib.sha256()
    for document in documents:
        total.update(json.dumps(document.ids).encode() + b"\n")
    return total.hexdigest()
