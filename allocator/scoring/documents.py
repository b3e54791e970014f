"""Calibration text: documents of token ids, in disjoint splits.

In: records (`allocator/scoring/records.py`) with `ids` (scored as they are), or with `text` or
`messages` (tokenised with the checkpoint's tokenizer, each text preceded by what that puts there
itself, concatenated, cut in windows), and optionally a `domain`. Out: documents, interleaved over
their domains so that every prefix is representative. Invariant: a split never holds a document of
another split.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from allocator.checkpoint.tokenizer import Tokenizer
from allocator.errors import CalibrationError
from allocator.files.progress import stepping, waiting
from allocator.scoring.chat import ChatTemplate
from allocator.scoring.records import Record, read_records


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


def read_documents(path: Path, *, vocab_size: int) -> list[Document]:
    """Reads the documents of a file whose records hold `ids`, in file order.

    Raises:
        CalibrationError: if a record has no usable ids.
    """
    documents = documents_of(read_records(path), vocab_size=vocab_size)
    if not documents:
        raise CalibrationError(f"{path}: no documents")
    return documents


def documents_of(records: Iterable[Record], *, vocab_size: int) -> list[Document]:
    """Returns one document per record, which hold `ids`.

    Raises:
        CalibrationError: if a record has no usable ids.
    """
    documents = []
    for record in records:
        ids = record.fields.get("ids")
        good = isinstance(ids, list) and len(ids) > 1
        if not good or not all(type(i) is int and 0 <= i < vocab_size for i in ids or ()):
            raise CalibrationError(
                f"{record.where}: needed ids, a list of 2 or more numbers below {vocab_size}"
            )
        text = record.fields.get("text")
        documents.append(Document(tuple(ids or ()), record.domain, text))
    return documents


def read_windows(path: Path, tokenizer: Tokenizer, *, window: int) -> list[Document]:
    """Reads real text in windows, see `windows_of`.

    Raises:
        CalibrationError: if the tokenizer is damaged, or the text shorter than one window.
    """
    return windows_of(read_records(path), tokenizer, window=window, name=str(path))


def windows_of(
    records: Iterable[Record], tokenizer: Tokenizer, *, window: int, name: str
) -> list[Document]:
    """Cuts texts in windows: per domain, texts are concatenated and cut.

    Args:
        records: with `text` or `messages`, and optionally `domain`.
        tokenizer: the checkpoint's; it puts bos before each text, or does not. Before messages
            stands what its chat template puts there.
        window: tokens per document; a last piece that is shorter is left out.
        name: of the text in messages.

    Raises:
        CalibrationError: if the tokenizer is damaged, has no chat template for messages, or the
            text is shorter than one window.
    """
    import tokenizers

    try:
        with waiting("loading the tokenizer"):
            library = tokenizers.Tokenizer.from_str(tokenizer.text)
            prefix = tokenizer.prefix
    except Exception as error:  # the library raises this very class
        raise CalibrationError(
            f"{tokenizer.path}/tokenizer.json: cannot be read ({error}); fetch the file again"
        ) from None
    chat: ChatTemplate | None = None
    streams: dict[str, list[int]] = {}
    for record in stepping(list(records), f"tokenizing {name}", unit="records", brief=True):
        text, before = record.fields.get("text"), prefix
        if text is None and "messages" in record.fields:
            chat = chat or ChatTemplate(tokenizer)
            text, before = chat.render(record.fields, record.where), ()
        if not isinstance(text, str):
            raise CalibrationError(f"{record.where}: needed text or messages, to be cut in windows")
        stream = streams.setdefault(record.domain, [])
        stream += [*before, *library.encode(text, add_special_tokens=False).ids]
    documents = [
        Document(tuple(stream[start : start + window]), domain)
        for domain, stream in streams.items()
        for start in range(0, len(stream) - window + 1, window)
    ]
    if not streams:
        raise CalibrationError(f"{name}: no documents; the file is empty")
    if not documents:
        longest = max(map(len, streams.values()))
        of_domain = ", in the longest of its domains" if len(streams) > 1 else ""
        raise CalibrationError(
            f"{name}: less text than one window of {window} tokens ({longest}{of_domain}); add "
            "text, or set a smaller window under [calibration]"
        )
    return documents


def last_share(
    documents: Sequence[Document], share: float
) -> tuple[list[Document], list[Document]]:
    """Splits off a share of every domain, its last documents: at least one of three, none of two.

    Where domains are so small that less than half of the share would come together, documents of
    all domains are split as one.

    Returns:
        The others, in their order, and the share.
    """
    if len(documents) < 3:
        return list(documents), []
    wanted = max(1, round(share * len(documents)))
    last: list[Document] = []
    for domain in dict.fromkeys(document.domain for document in documents):
        members = [document for document in documents if document.domain == domain]
        last += members[len(members) - int(share * len(members)) :]
    if 2 * len(last) < wanted:
        last = interleaved(documents)[-wanted:]
    chosen = {id(document) for document in last}
    return [d for d in documents if id(d) not in chosen], last


def every_third(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Splits every domain in two thirds, and a third: the third, sixth, ... document.

    Where domains are so small that less than a fifth would be the third, all domains are split as
    one; of two documents, the second is the third.
    """
    seen: dict[str, int] = {}
    parts: tuple[list[Document], list[Document]] = [], []
    for document in documents:
        seen[document.domain] = seen.get(document.domain, 0) + 1
        parts[seen[document.domain] % 3 == 0].append(document)
    if len(parts[1]) * 5 < len(documents) > 1:
        mixed = interleaved(documents)
        chosen = {*range(2, len(mixed), 3)} or {1}
        parts = [d for i, d in enumerate(mixed) if i not in chosen], [mixed[i] for i in chosen]
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
