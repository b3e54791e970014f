"""Records of text, from the files that people have.

In: a `.txt` file (one record), a `.parquet` file (one record a row), any other file as JSON lines
(one record a line), or the default text inside the package. Out: records, each with its fields and
its place. Invariant: whatever is wrong with a file is one line that names place and way out.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from allocator.errors import CalibrationError, first_line, reason

FIELDS = ("ids", "text", "messages")
"""What a record may hold; the first of them that it has is read."""
DEFAULT_TEXT = "the default text"
"""What messages call the text inside the package."""
_ONE_A_LINE = "needed one record a line: jq -c '.[]' FILE > FILE.jsonl"
_SEPARATOR = "%%"


@dataclass(frozen=True, slots=True)
class Record:
    """One text, chat or list of token ids.

    Attributes:
        where: its place for messages, e.g. `documents.jsonl:3`.
        fields: `ids`, `text` or `messages`, and optionally `domain` and `tools`.
    """

    where: str
    fields: Mapping[str, Any]

    @property
    def domain(self) -> str:
        """Where the text is from; `""` if unknown."""
        return str(self.fields.get("domain") or "")


def read_records(path: Path) -> Iterator[Record]:
    """Yields the records of a file, by its suffix: `.txt`, `.parquet`, else JSON lines.

    Raises:
        CalibrationError: if the file cannot be read or is of another kind, naming line or row.
    """
    suffix = path.suffix.lower()
    read = {".txt": _text, ".parquet": _parquet}.get(suffix, _json_lines)
    try:
        for record in read(path):
            if not any(field in record.fields for field in FIELDS):
                names = ", ".join(map(str, record.fields)) or "none"
                raise CalibrationError(
                    f"{record.where}: needed an object with ids, text or messages; its fields are "
                    f"{names}"
                )
            yield record
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: cannot be read as UTF-8 (byte 0x{error.object[error.start]:02x}); convert "
            "the file, e.g. iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path}: cannot be read ({reason(error)})") from None


def default_records() -> Iterator[Record]:
    """Yields the records of the default text, which ships inside the package."""
    folder = resources.files("allocator").joinpath("data/calibration")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".txt"):
            domain = file.name.removesuffix(".txt")
            texts = file.read_text(encoding="utf-8").removesuffix("\n").split(f"\n{_SEPARATOR}\n")
            for number, text in enumerate(texts, 1):
                yield Record(f"{file.name}:{number}", {"text": text, "domain": domain})


def _text(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8-sig")
    if text.strip():
        yield Record(str(path), {"text": text})


def _json_lines(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and line.strip() in ("[", "{"):
                    raise CalibrationError(
                        f"{path}: holds one JSON value over several lines; {_ONE_A_LINE}"
                    ) from None
                raise CalibrationError(f"{where}: no JSON ({error})") from None
            if isinstance(fields, list) and number == 1:
                raise CalibrationError(f"{path}: holds a JSON array; {_ONE_A_LINE}")
            if not isinstance(fields, dict):
                raise CalibrationError(
                    f"{where}: needed an object with ids, text or messages, and is a JSON "
                    f"{type(fields).__name__}"
                )
            yield Record(where, fields)


def _parquet(path: Path) -> Iterator[Record]:
    with path.open("rb"):  # says why in words, where it cannot be opened
        pass
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(
            f"{path}: reading parquet needs pyarrow; pip install pyarrow, or give JSON lines"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        columns = [n for n in (*FIELDS, "domain", "tools") if n in file.schema_arrow.names]
        if not set(columns) & set(FIELDS):
            raise CalibrationError(
                f"{path}: needed a column ids, text or messages; its columns are "
                f"{', '.join(file.schema_arrow.names) or 'none'}"
            )
        number = 0
        for batch in file.iter_batches(columns=columns, batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path}, row {number}", row)
    except ArrowException as error:
        raise CalibrationError(f"{path}: cannot be read as parquet ({first_line(error)})") from None
