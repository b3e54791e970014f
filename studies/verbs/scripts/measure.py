"""Runs every verb in a terminal of 80 columns, and says how long each leaves its user in the dark.

    python studies/verbs/scripts/measure.py --text FILE --out DIR [--model studies/qwen3/model]

In: a checkpoint with a tokenizer. Out: `verbs.csv`, a row per command, in the order of a new user's
road: seconds to the first character, longest time in which the screen did not change (the end
included), widest line, seconds in all; and the recorded terminal in DIR. Each command has stdout and
stderr on one pseudo-terminal. Load slows everything: run it on a quiet machine.
"""

import argparse
import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from unicodedata import east_asian_width

import pandas as pd

HERE = Path(__file__).parents[1]
HELD_OUT = "held-out.jsonl"
MODEL = HERE.parent / "qwen3" / "model"
ROWS, COLUMNS = 24, 80
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
COMPARE = '\n[compare]\nsamplers = ["knapsack", "random"]\nweights = [{weights}]\nseeds = {{ gguf = 1 }}\ntokens = {tokens}\n'


def commands() -> list[list[str]]:
    """Lists the verbs with their arguments, in the order of the road."""
    model, study, made = Path("my-moe"), Path("study"), Path("made")
    pick, knapsack = (str(study / f"allocations/{name}.json") for name in ("pick", "knapsack"))
    gguf = str(made / "gguf/model.gguf")
    budget = ["--bits", "3", "--trials", "12", "--report", HELD_OUT]
    return [
        ["quantize", str(model), *budget, "--out", "one", "--dry-run"],
        ["quantize", str(model), *budget, "--out", "one"],
        ["inspect", str(model)],
        ["plan", str(model / "config.json"), "--device", "geforce-rtx-4090"],
        ["init", str(model), *budget, "--out", str(study)],
        ["profile", str(study)],
        ["search", str(study), "--dry-run"],
        ["search", str(study)],
        ["finish", pick, "--tokens", "8192"],
        ["front", str(study)],
        ["explain", pick],
        ["diff", pick, knapsack],
        ["score", pick],
        ["evaluate", str(study)],
        ["report", str(study)],
        ["materialize", pick, str(made / "gguf"), "--record"],
        ["verify", str(made / "gguf"), "--study", str(study)],
        ["materialize", pick, str(made / "safetensors"), "--container", "safetensors", "--record"],
        ["verify", str(made / "safetensors"), "--study", str(study)],
        ["reproduce", pick, "--out", "again"],
        ["score", gguf, "--study", str(study)],
        ["imatrix", str(study), "imatrix.gguf"],
        ["compare", str(study), "--dry-run"],
        ["compare", str(study), "--baselines", "none"],
    ]


class Terminal:
    """A pseudo-terminal that keeps what was written, and when."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=folder
        )
        os.close(slave)
        self.changes: list[tuple[float, bytes]] = []
        while True:
            if select.select([master], [], [], 0.5)[0]:
                try:
                    data = os.read(master, 1 << 16)
                except OSError:  # the last process with the terminal ended
                    break
                if not data:
                    break
                self.changes.append((time.monotonic() - began, data))
        self.code = process.wait()
        self.seconds = time.monotonic() - began
        os.close(master)

    @property
    def text(self) -> str:
        """What was written, control sequences included."""
        return b"".join(data for _, data in self.changes).decode(errors="replace")

    @property
    def width(self) -> int:
        """Columns of the widest line that was written."""
        lines = re.split(r"[\r\n]+", CONTROL.sub("", self.text))
        return max((sum(1 + (east_asian_width(c) in "WF") for c in x) for x in lines), default=0)

    @property
    def silence(self) -> float:
        """Longest time without a change, in seconds, from the start to the end."""
        times = [0.0, *(at for at, _ in self.changes), self.seconds]
        return max(b - a for a, b in zip(times, times[1:], strict=False))


def add_compare(study: Path) -> None:
    """Gives a study two short runs to compare, at its own budget."""
    settings = json.loads((study / "allocations/pick.json").read_text())
    path = study / "study.toml"
    if "\n[compare]" not in path.read_text():
        text = COMPARE.format(weights=settings["bytes"]["budget"], tokens=450_000)
        path.write_text(path.read_text() + text)


def main() -> None:
    """Runs the verbs one after another; stops at the first that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; is emptied")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, required=True, help="held-out text, JSON lines")
    given = parser.parse_args()
    out = given.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    (out / "terminal").mkdir(parents=True)
    shutil.copy(given.text, out / HELD_OUT)
    shutil.copytree(given.model, out / "my-moe")
    allocator = Path(sys.executable).with_name("allocator")
    environment = os.environ | {
        "ALLOCATOR_CACHE": str(out / "cache"), "TERM": "xterm", "COLUMNS": str(COLUMNS),
    }  # fmt: skip
    rows = []
    for number, command in enumerate(commands()):
        if command[0] == "compare":
            add_compare(out / "study")
        shown = " ".join(["allocator", *command])
        terminal = Terminal([str(allocator), *command], environment, out)
        record = out / "terminal" / f"{number:02}-{command[0]}.txt"
        record.write_text(f"$ {shown}\n{terminal.text}")
        rows.append({
            "verb": " ".join([command[0], *["--dry-run"] * ("--dry-run" in command)]),
            "first": round(terminal.changes[0][0], 1) if terminal.changes else None,
            "silence": round(terminal.silence, 1),
            "width": terminal.width,
            "seconds": round(terminal.seconds, 1),
            "code": terminal.code,
            "command": shown,
        })  # fmt: skip
        pd.DataFrame(rows).to_csv(HERE / "verbs.csv", index=False)
        print({k: v for k, v in rows[-1].items() if k != "command"}, flush=True)
        if terminal.code:
            raise SystemExit(f"{shown}: ended with {terminal.code}, see {record}")


if __name__ == "__main__":
    main()
