"""TOML files that people write: all that is wrong at once, in words written here by hand."""

import pytest

from allocator.app.study_file import StudySpec
from allocator.errors import StudyError

NAMES = '"auto", "knapsack", "random", "tpe", "nsga2", "evolution"'
SIZE = 'needed a size above 0 such as "12GiB" or "1.5GB", or a number of bytes'
WRONG = f"""
chekpoint = "m"
trials = 0
rungs = [3]
space = "nowhere.toml"
tokenizer = "maybe"
seed = true
expert_width = "64"
surprise = 1
# ---
chekpoint: unknown key; did you mean checkpoint?
rungs: unknown key; it belongs under [calibration]
surprise: unknown key; known: {{known}}
schema: missing; add above the first [table] the line: schema = 1
target: missing; add above the first [table] the line: target = "gguf" # or "safetensors"
seed = true: needed a whole number from 0 to 4,294,967,295
trials = 0: needed a whole number from 1 to 2,147,483,647
tokenizer = "maybe": needed one of "checkpoint", "none"
expert_width = "64": needed a whole number, 1 or more
space = "nowhere.toml": no such file; needed a path relative to {{folder}}, {{spaces}}
# ---
[calibration]
documents = "x.jsonl"
rungs = [4, 2]
trials = 3
# ---
[calibration] trials: unknown key; it belongs above the first [table]
[calibration] rungs = [4, 2]: needed rising numbers, each once: [2, 4]
[calibration] documents = "x.jsonl": no such file; needed a path relative to {{folder}}
# ---
[budget]
file = "much"
weights = 0
device = 3
# ---
[budget] weights = 0: {SIZE}
[budget] file = "much": {SIZE}
[budget] device = 3: needed a table, under a header [budget.device]
# ---
[streamed]
candidates = 257
rows = nan
# ---
[streamed] candidates = 257: needed a whole number from 1 to 256
[streamed] rows = nan: needed a number, above 0 and up to 1
# ---
[compare]
samplers = ["auto", "Knapsack"]
weights = []
seeds = {{{{onnx = 1, gguf = 0}}}}
[[compare.long]]
sampler = "tpe"
target = "gguf"
weights = "8MiB"
tokens = 1
# ---
[compare] samplers has "Knapsack": needed one of {NAMES}; did you mean "knapsack"?
[compare] weights is empty: needed a list of one or more of: {SIZE.removeprefix("needed ")}
[compare] seeds has the key "onnx": needed one of "gguf", "safetensors"
[compare] seeds.gguf = 0: needed a whole number, 1 or more
[[compare.long]] weights = "8MiB": needed a list of one or more of: {SIZE.removeprefix("needed ")}
"""
TEXTS, SAID = (WRONG.split("# ---\n")[i::2] for i in (0, 1))


def refused(folder, text):
    (folder / "study.toml").write_text(text)
    with pytest.raises(StudyError) as caught:
        StudySpec.read(folder)
    return str(caught.value).splitlines()


def test_every_fault_of_a_file_is_told_at_once(tmp_path):
    known = "schema, checkpoint, target, space, sampler, seed, trials, tokenizer, expert_width"
    known += ", calibration, budget, streamed, compare"
    spaces = "or the name of a shipped one: careful, default, whole-device"
    said = "".join(SAID).format(folder=tmp_path, known=known, spaces=spaces).splitlines()
    lines = refused(tmp_path, "".join(TEXTS).format())
    assert sorted(lines) == sorted(f"{tmp_path}/study.toml: {line}" for line in said)


def test_a_file_of_another_schema_is_told_nothing_else(tmp_path):
    said = refused(tmp_path, "schema = 2\ncolour = 1")
    assert said == [f"{tmp_path}/study.toml: schema 2, needed 1; use a newer allocator"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('target = "gguf"', "", "target: missing; add above the first [table] the line: target ="),
        ("schema = 1", "", "schema: missing; add above the first [table] the line: schema = 1"),
        ("weights = 1", 'weights = 1\nfile = "2KiB"', "[budget] weights and file: needed one of"),
        ("[budget]", "[[budget]]", "budget = [{ weights = 1 }]: needed a table, under a header"),
    ],
    ids=str,
)
def test_one_fault_is_one_line(tmp_path, old, new, said):
    text = 'schema = 1\ncheckpoint = "."\ntarget = "gguf"\n[budget]\nweights = 1\n'
    text += '[calibration]\ndocuments = "study.toml"\n'
    (line,) = refused(tmp_path, text.replace(old, new))
    assert said in line
