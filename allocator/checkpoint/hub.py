"""Models on the Hugging Face hub: an id becomes a folder or a GGUF file on this machine.

In: what a user calls a model: a path, or `OWNER/NAME`, `OWNER/NAME@REVISION`,
`OWNER/NAME:PART_OF_A_GGUF_NAME`. Out: a path that `read_inventory` takes. Invariant: a path that
exists is never looked up; nothing but weights in safetensors or GGUF, JSON and tokenizers is
fetched, and only after the disk was found to hold it. What was fetched before is not fetched again.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from allocator.errors import CheckpointError, first_line
from allocator.files.machine import free_disk
from allocator.units import show_bytes

_ID = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?(:(?P<gguf>[\w.-]+))?", re.ASCII
)
_FETCHED = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
_OTHER_WEIGHTS = ("consolidated*", "original/*", "onnx/*", "*/*")
"""The same weights once more, in another layout or folder."""


def is_hub_id(model: str) -> bool:
    """Returns whether a text is an id on the hub, and no path of this machine."""
    return not Path(model).exists() and _ID.fullmatch(model) is not None


def model_path(model: str | Path, *, progress: bool = False) -> Path:
    """Returns the directory or file of a model; fetches it where it is an id on the hub.

    The hub's own cache holds what was fetched (`HF_HOME`); a fetch that was stopped resumes.

    Args:
        model: a path, or an id: `OWNER/NAME`, with `@REVISION`, or with `:BF16` for the GGUF model
            whose name contains that.
        progress: shows bars of what is fetched.

    Raises:
        CheckpointError: if there is neither such a path nor such a model, it may not be read, it
            cannot be reached, the disk is too small, or the id names no weights or several.
    """
    text = str(model)
    if not is_hub_id(text):
        if not Path(text).exists():
            raise CheckpointError(
                f"{text}: no such model; needed a directory with safetensors and config.json, a "
                "GGUF file, or an id on the Hugging Face hub, e.g. Qwen/Qwen3-30B-A3B"
            )
        return Path(text)
    match = _ID.fullmatch(text)
    assert match is not None
    return _fetched(text, match["id"], match["revision"], match["gguf"], progress=progress)


def _fetched(
    text: str, repo: str, revision: str | None, gguf: str | None, *, progress: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    asked: dict[str, Any] = {
        "repo_id": repo,
        "revision": revision,
        "allow_patterns": [*_FETCHED] if gguf is None else [f"*{gguf}*.gguf"],
        "ignore_patterns": [*_OTHER_WEIGHTS] if gguf is None else None,
    }
    hidden = are_progress_bars_disabled()
    try:
        if not progress:
            disable_progress_bars()
        with suppress(DryRunError):  # the hub is out of reach, or refuses: the fetch says which
            files = snapshot_download(**asked, dry_run=True)
            _names([f.filename for f in files], text, gguf)
            _check_disk(text, sum(f.file_size for f in files if f.will_download))
        folder = Path(snapshot_download(**asked))
        names = _names([f.name for f in folder.iterdir()], text, gguf)
    except RevisionNotFoundError:
        raise CheckpointError(f"{text}: the hub has no revision {revision!r} of it") from None
    except GatedRepoError:
        raise CheckpointError(
            f"{text}: gated on the hub; accept its terms there and log in (hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{text}: neither a path of this machine nor a model that the hub shows you; check the "
            "spelling, or log in (hf auth login) if it is private"
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{text}: no id on the hub ({first_line(error)})") from None
    except (IncompleteSnapshotError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{text}: cannot be fetched ({first_line(error)}); the same command resumes, or give "
            "the directory of a copy"
        ) from None
    finally:
        if not hidden:
            enable_progress_bars()
    return folder if gguf is None else folder / names[0]


def _names(files: list[str], text: str, gguf: str | None) -> list[str]:
    """The GGUF file to open among those of an id, by its first part; none of safetensors.

    Raises:
        CheckpointError: if there are no weights, or those of several GGUF models.
    """
    if gguf is None:
        if any(name.endswith(".safetensors") for name in files):
            return []
        raise CheckpointError(
            f"{text}: has no safetensors; of a model in GGUF name the file: {text}:BF16"
        )
    named = sorted((n for n in files if gguf in n and n.endswith(".gguf")), reverse=True)
    stems = {re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", name): name for name in named}
    if len(stems) == 1:
        return [*stems.values()]
    known = ", ".join(sorted(stems)) or "none"
    raise CheckpointError(f"{text}: needed one GGUF model with {gguf!r} in its name, got {known}")


def _check_disk(text: str, missing: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    free = free_disk(Path(HF_HUB_CACHE))
    if missing > free:
        raise CheckpointError(
            f"{text}: {show_bytes(missing)} to fetch, {show_bytes(free)} free in {HF_HUB_CACHE}; "
            "free some disk, or set HF_HOME to another one"
        )
