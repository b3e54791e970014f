"""Makes the parsers of the command line: verbs, options, their help, and a shell's completion.

In: nothing. Out: parsers, and their help as text. Invariant: no library is loaded for them.
"""

import argparse
import re
import textwrap
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from allocator.errors import AllocatorError
from allocator.units import parse_bytes, parse_seconds

_Action = TypeVar("_Action", bound=argparse.Action)
WIDTH = 80
"""Columns of help and output."""
_LOG_LEVELS = ("debug", "info", "warning", "error")
_LEAST_BYTES = 1024  # of a size without a unit: 12 is meant as 12GiB
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
        super().__init__(prog, width=WIDTH)

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

        whole, verbs = parsers(listed=True)
        for action in (action for verb in verbs.values() for action in verb.own):
            if action.type is Path or action.metavar == "FILE" or action.dest == "model":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(whole, shell=values))
        parser.exit()


def help_texts() -> dict[str, str]:
    """Returns the help of `allocator` and of every verb, in the order of their use, by command.

    No option has both a short name and a value, which Python 3.13 prints otherwise than 3.11.
    """
    parser, verbs = parsers()
    named = {f"allocator {name}": verbs[name] for names in _ROAD.values() for name in names}
    plain = re.compile(r"\x1b\[[0-9;]*m")  # Python 3.14 prints in colours
    return {n: plain.sub("", p.format_help()) for n, p in ({"allocator": parser} | named).items()}


def parsers(*, listed: bool = False) -> tuple[_Parser, dict[str, _Parser]]:
    """Makes the parser of the command line, and those of its verbs by name.

    Args:
        listed: argparse lists the verbs, too, as completion needs it.
    """
    parser = _Parser(
        prog="allocator",
        description=textwrap.fill(
            "Search how many experts each layer of an MoE model keeps and which format every "
            "tensor gets, inside a memory budget; write and verify the checkpoint.",
            WIDTH,
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

    def verb(name: str, text: str) -> _Parser:
        texts[name] = text
        shown: Any = {"help": text} if listed else {}
        sub = verbs.add_parser(name, description=text, formatter_class=_Help, **shown)
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

    p = verb("quantize", "one command: search, finish, write and verify; resumable")
    _new_study(p)
    p.add_argument("--time", type=_seconds, help="time limit of all stages together, e.g. 2h")
    p.add_argument("--no-finish", action="store_true", help="write the pick unfinished")
    p.add_argument("--dry-run", action="store_true", help="print the plan and its estimate only")
    _runs_forward(p)

    p = verb("inspect", "list the groups of a checkpoint; reads headers only")
    p.add_argument(
        "checkpoint",
        type=Path,
        help="directory with safetensors and config.json, or a GGUF in BF16, F16, F32 or Q8_0",
    )
    p.add_argument("--target", default="safetensors", help="gguf or safetensors (default)")
    _expert_width(p)

    p = verb("init", "make a study of a model: a study.toml with every key, explained")
    _new_study(p)

    p = verb("plan", "what a model takes on a device, from its config.json alone")
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

    p = verb("profile", "measure sensitivities; continues where it was stopped")
    _study(p)
    _runs_forward(p)

    p = verb("search", "launch or resume a study; pick on the selection split")
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

    p = verb("front", "list the non-dominated trials; writes front.json")
    _study(p)
    p.add_argument("--storage", help="as for search")

    p = verb("explain", "per decision: bytes, predicted loss, next step up and down")
    _allocation(p)
    _study_option(p)

    p = verb("diff", "which decisions two allocation files make differently")
    p.add_argument("one", type=Path, help="allocation file, or a written allocation.json")
    p.add_argument("other", type=Path, help="what it is compared with")

    p = verb("score", "measure an allocation, llama-quantize tensor types, or a .gguf")
    _allocation(p)
    _study_option(p)
    p.add_argument(
        "--documents", type=_positive, help="of a .gguf: held-out documents (default: up to 48)"
    )
    p.add_argument("--base", help="tensor-type file: format of the tensors that it does not name")
    _runs_forward(p)

    p = verb("finish", "the same formats and bytes at less loss; resumable")
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

    p = verb("materialize", "write the checkpoint of an allocation")
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

    p = verb("imatrix", "write the importance as an imatrix for llama-quantize")
    _study(p)
    p.add_argument("out", type=Path, help="file to write: .gguf, or .dat for the binary form")
    p.add_argument(
        "--allocation",
        type=Path,
        help="its importance and retained experts (default: all experts); writes its formats too, "
        "for --tensor-type-file",
    )
    _runs_forward(p)

    p = verb("verify", "re-open a written checkpoint in its runtime and compare")
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

    p = verb("evaluate", "held-out KL and perplexity beside uniform formats and role mixes")
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

    p = verb("report", "one HTML page of what a study found; measures nothing")
    _study(p)
    p.add_argument("--out", type=Path, help="file to write (default: STUDY/report.html)")
    p.add_argument(
        "--allocation", type=Path, help="record to report (default: STUDY/allocations/pick.json)"
    )
    p.add_argument("--storage", help="as for search")

    p = verb("compare", "searchers side by side at equal forward tokens; resumable")
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

    p = verb("reproduce", "rebuild a committed allocation's files; compares sha256")
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
