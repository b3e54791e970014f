"""Counts how a checkout's code is built: who knows what, who imports whom, how docstrings begin.

    python studies/structure/scripts/count.py [CHECKOUT] [--list] [--json]

Everything is read from the syntax trees of `allocator/` and `tests/`; nothing is imported. `--list`
prints the places behind every figure. The rules are the docstrings of the functions below.
"""

import argparse
import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

GGUF_RUNTIME = ("checkpoint/gguf", "targets/gguf", "export/gguf", "targets/ggml")
RUNTIMES = (*GGUF_RUNTIME, "targets/safetensors", "export/safetensors")
CONTAINERS = {"gguf", "safetensors"}
MODEL_TYPES = {"deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss"}
ARRAYS = re.compile(r"\b(Floats|Ints|Bytes|Bools|Doubles|Codes|Array\w*|NDArray|ndarray|Tensor)\b")
SHAPE = re.compile(r"\w+`? x `?\w|\([\w.*… ]+,[^()]*\)|\bscalar\b|\bone (number|value|float)\b")
N_LINES = 400
VERBS = {  # third person, as docstrings of functions begin
    "Abandons", "Accepts", "Adds", "Allocates", "Answers", "Appends", "Applies", "Asks",
    "Assigns", "Averages", "Begins", "Binds", "Bounds", "Bridges", "Builds", "Caches", "Calls",
    "Cancels", "Changes", "Checks", "Chooses", "Claims", "Closes", "Collects", "Combines",
    "Compares", "Compiles", "Completes", "Computes", "Converts", "Copies", "Corrects", "Counts",
    "Creates", "Cuts", "Decodes", "Decompresses", "Deletes", "Derives", "Describes", "Discards",
    "Divides", "Draws", "Drops", "Empties", "Encodes", "Ends", "Enqueues", "Ensures",
    "Estimates", "Evaluates", "Expands", "Fails", "Fills", "Filters", "Finds", "Finishes",
    "Fits", "Fixes", "Flushes", "Forgets", "Formats", "Forwards", "Frees", "Gathers",
    "Generates", "Gets", "Gives", "Groups", "Hands", "Hashes", "Holds", "Identifies", "Ignores",
    "Imports", "Includes", "Informs", "Installs", "Interleaves", "Inverts", "Iterates", "Joins",
    "Keeps", "Launches", "Lays", "Learns", "Leaves", "Lets", "Limits", "Lists", "Loads",
    "Locks", "Logs", "Looks", "Makes", "Maps", "Marks", "Matches", "Materializes", "Measures",
    "Mends", "Merges", "Minimises", "Mounts", "Moves", "Names", "Normalizes", "Notes",
    "Numbers", "Observes", "Offers", "Opens", "Orders", "Packs", "Parses", "Picks", "Plans",
    "Plots", "Predicts", "Prepares", "Prices", "Prints", "Probes", "Proposes", "Puts", "Raises",
    "Ranks", "Re-opens", "Reads", "Rebuilds", "Records", "Reduces", "Refuses", "Registers",
    "Releases", "Removes", "Renames", "Renews", "Repairs", "Repeats", "Replaces", "Reports",
    "Resets", "Resizes", "Resolves", "Restores", "Resumes", "Returns", "Rounds", "Runs",
    "Samples", "Saves", "Says", "Scales", "Scores", "Seals", "Searches", "Selects", "Sets",
    "Shares", "Shows", "Sizes", "Skips", "Solves", "Sorts", "Splits", "Spreads", "Stands",
    "Starts", "Steps", "Stops", "Stores", "Strips", "Sums", "Swaps", "Switches", "Tabulates",
    "Takes", "Tells", "Tests", "Times", "Tokenizes", "Trains", "Transfers", "Translates",
    "Tries", "Turns", "Undoes", "Unseals", "Updates", "Uses", "Verifies", "Waits", "Walks",
    "Warns", "Watches", "Weighs", "Wraps", "Writes", "Yields",
}  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """A file's syntax tree."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(root))
        self.text = path.read_text()
        self.tree = ast.parse(self.text)

    @cached_property
    def prose(self) -> set[int]:
        """Ids of the constants that are docstrings, of attributes too."""
        return {
            id(n.value) for n in ast.walk(self.tree)
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        }  # fmt: skip

    def walk(self) -> Iterator[ast.AST]:
        """Every node that is no docstring."""
        return (n for n in ast.walk(self.tree) if id(n) not in self.prose)

    def at(self, node: ast.AST, what: object = "") -> str:
        """A place, for `--list`."""
        return f"{self.name}:{node.lineno} {what}".rstrip()


def inside(module: Module, *folders: str) -> bool:
    """Whether a module of `allocator/` lies in one of these folders, or has such a name."""
    return module.name.removeprefix("allocator/").startswith(folders)


def text_of(node: ast.AST | None) -> str | None:
    """The value of a string constant."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def last_name(node: ast.AST) -> str:
    """`c` of `a.b.c`, of `c[0]` and of `a.c()`; the name of a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return last_name(node.value) if isinstance(node, ast.Subscript) else ""


def config_keys(root: Path) -> set[str]:
    """Every key of the `config.json` files that the tests hold."""
    keys: set[str] = set()

    def add(value: object) -> None:
        if isinstance(value, dict):
            keys.update(value)
            for inner in value.values():
                add(inner)

    folder = root / "tests" / "data" / "configs"
    for path in folder.glob("*.json") if folder.is_dir() else (root / "tests").rglob("*-*b.json"):
        add(json.loads(path.read_text()))
    return keys | {"text_config", "quantization_config", "model_type"}


def reads_config(module: Module, keys: set[str]) -> Iterator[str]:
    """`x["key"]`, `x.get("key")` or `"key" in x` of a key of config.json, where x ends in `config`."""
    for n in module.walk():
        if isinstance(n, ast.Subscript):
            key, of = text_of(n.slice), n.value
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.args:
            if n.func.attr not in ("get", "pop", "setdefault"):
                continue
            key, of = text_of(n.args[0]), n.func.value
        elif isinstance(n, ast.Compare) and isinstance(n.ops[0], ast.In | ast.NotIn):
            key, of = text_of(n.left), n.comparators[0]
        else:
            continue
        named = last_name(of).endswith(("config", "rope_scaling", "quantization")) or last_name(
            of
        ) in ("c",)
        if key in keys and named:
            yield module.at(n, key)


def tests_model_type(module: Module) -> Iterator[str]:
    """A string that is a model type, or a comparison of `model_type`."""
    for n in module.walk():
        if text_of(n) in MODEL_TYPES:
            yield module.at(n, text_of(n))
        elif isinstance(n, ast.Compare) and any(
            last_name(x) == "model_type" for x in (n.left, *n.comparators)
        ):
            yield module.at(n, "model_type")


def names_ggml(module: Module) -> Iterator[str]:
    """A name, an attribute, an import or a string of code (no docstring) that has `ggml` in it."""
    for n in module.walk():
        if isinstance(n, ast.Import | ast.ImportFrom):
            found = [getattr(n, "module", "") or "", *(a.name for a in n.names)]
        else:
            found = [getattr(n, "id", ""), getattr(n, "attr", ""), text_of(n) or ""]
        if any("ggml" in x.lower() for x in found if isinstance(x, str)):
            yield module.at(n, next(x for x in found if "ggml" in x.lower()))


def _is_container(node: ast.AST) -> bool:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(_is_container, node.elts))
    constant = isinstance(node, ast.Attribute) and node.attr == "name"
    return text_of(node) in CONTAINERS or (
        constant and last_name(node.value) in ("GGUF", "SAFETENSORS")
    )


def tests_container(module: Module) -> Iterator[str]:
    """A comparison with, a match of, or a table keyed by the name of a container."""
    for n in module.walk():
        if isinstance(n, ast.Compare) and any(map(_is_container, (n.left, *n.comparators))):
            yield module.at(n, ast.unparse(n))
        elif isinstance(n, ast.Dict) and any(k is not None and _is_container(k) for k in n.keys):
            yield module.at(n, ast.unparse(n)[:60])
        elif isinstance(n, ast.MatchValue) and _is_container(n.value):
            yield module.at(n, ast.unparse(n.value))


def attribute_protocols(module: Module) -> Iterator[str]:
    """`getattr` or `hasattr` with a constant name: an attribute that no type declares."""
    for n in module.walk():
        if isinstance(n, ast.Call) and last_name(n.func) in ("getattr", "hasattr"):
            if len(n.args) > 1 and text_of(n.args[1]) is not None:
                yield module.at(n, ast.unparse(n))


def any_options(module: Module) -> Iterator[str]:
    """A signature that ends in `**name: Any`."""
    for n in module.walk():
        if isinstance(n, Function) and n.args.kwarg is not None and n.args.kwarg.annotation:
            if last_name(n.args.kwarg.annotation) == "Any":
                yield module.at(n, f"{n.name}(**{n.args.kwarg.arg})")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_names(modules: list[Module]) -> set[str]:
    """Names of functions, classes, variables, arguments and attributes that modules define."""
    names: set[str] = set()
    for m in modules:
        for n in ast.walk(m.tree):
            if isinstance(n, Function | ast.ClassDef):
                names.add(n.name)
            elif isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Store):
                names.add(n.id if isinstance(n, ast.Name) else n.attr)
            elif isinstance(n, ast.Call) and last_name(n.func) in ("namedtuple", "make_dataclass"):
                continue
    return names


NAMEDTUPLE = {"_asdict", "_replace", "_fields", "_make"}


def optuna_private(module: Module, own: set[str]) -> Iterator[str]:
    """A private attribute or import that nothing in `allocator/` defines, where Optuna is known."""
    if "optuna" not in module.text:
        return
    for n in module.walk():
        if isinstance(n, ast.Attribute) and _is_private(n.attr):
            if n.attr not in own and n.attr not in NAMEDTUPLE and last_name(n.value) != "os":
                yield module.at(n, n.attr)
        elif isinstance(n, ast.ImportFrom) and (n.module or "").startswith("optuna"):
            path = [*(n.module or "").split("."), *(a.name for a in n.names)]
            if any(map(_is_private, path)):
                yield module.at(n, ".".join(path))


# -- packages


def arrows(modules: list[Module]) -> dict[tuple[str, str], list[str]]:
    """Imports from one package of `allocator/` to another, inside functions too."""
    found = defaultdict(list)
    for m in modules:
        package = m.name.removeprefix("allocator/").removesuffix(".py").split("/")[0]
        for n in ast.walk(m.tree):
            if isinstance(n, ast.Import):
                names = [a.name for a in n.names]
            elif isinstance(n, ast.ImportFrom):
                names = [f"{n.module}.{a.name}" for a in n.names]
            else:
                continue
            for name in names:
                if name.startswith("allocator.") and name.split(".")[1] != package:
                    found[package, name.split(".")[1]].append(m.at(n, name))
    return found


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Sets of packages that reach each other."""
    after = defaultdict(set)
    for a, b in edges:
        after[a].add(b)

    def reach(a: str) -> set[str]:
        seen, waiting = set(), [a]
        while waiting:
            for b in after[waiting.pop()] - seen:
                seen.add(b)
                waiting.append(b)
        return seen

    nodes = {x for edge in edges for x in edge}
    reached = {n: reach(n) for n in nodes}
    groups = {frozenset({m for m in reached[n] if n in reached[m]} | {n}) for n in nodes}
    return [sorted(g) for g in groups if len(g) > 1]


def declared_order(root: Path) -> dict[str, int]:
    """The place of every package in the list of tests/test_imports.py, innermost first."""
    places: dict[str, int] = {}
    for n in ast.parse((root / "tests/test_imports.py").read_text()).body:
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.List) and not places:
            for i, item in enumerate(n.value.elts):
                for name in item.elts if isinstance(item, ast.Set | ast.Tuple) else [item]:
                    places[text_of(name) or ""] = i
    return places


# -- docstrings


def public_functions(module: Module) -> Iterator[tuple[str, Function]]:
    """Public functions, and methods of public classes; no properties, dunders, overloads."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
        for n in body:
            if isinstance(n, ast.ClassDef) and not n.name.startswith("_"):
                yield from visit(n.body, f"{prefix}{n.name}.")
            elif isinstance(n, Function) and not n.name.startswith("_"):
                marks = {last_name(d) or last_name(getattr(d, "func", d)) for d in n.decorator_list}
                if not marks & {"property", "cached_property", "setter", "overload", "override"}:
                    yield prefix + n.name, n

    if not Path(module.name).name.startswith("_") or module.name.endswith("__init__.py"):
        yield from visit(module.tree.body, "")


def begins_with_verb(docstring: str) -> bool:
    """Whether the first word is one of `VERBS`."""
    return re.split(r"[^\w-]", docstring.strip(), maxsplit=1)[0] in VERBS


def has_arrays(function: Function) -> bool:
    """Whether an argument or the result is annotated as an array."""
    a = function.args
    given = [x.annotation for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x]
    return any(x is not None and ARRAYS.search(ast.unparse(x)) for x in (*given, function.returns))


# -- tests


def private_reaches(module: Module, own: set[str]) -> Iterator[tuple[str, str]]:
    """Private names of `allocator/` that a test imports, patches, or reads of an object."""
    for n in ast.walk(module.tree):
        names: list[str] = []
        if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("allocator"):
            names = [a.name for a in n.names]
        elif isinstance(n, ast.Attribute) and last_name(n.value) not in ("self", "cls"):
            names = [n.attr]
        elif isinstance(n, ast.Call) and last_name(n.func) in (
            "setattr",
            "object",
            "patch",
            "delattr",
            "getattr",
        ):
            names = [(text_of(x) or "").rsplit(".", 1)[-1] for x in n.args[:2]]
        for name in names:
            if _is_private(name) and name in own and name not in NAMEDTUPLE:
                yield name, module.at(n, name)


def patched_names(module: Module, modules: set[str]) -> Iterator[tuple[str, str]]:
    """`name` of `setattr(module, name, ...)` for a module of `allocator/`, or of its dotted path."""
    imported = {
        a.asname or a.name
        for n in ast.walk(module.tree)
        if isinstance(n, ast.ImportFrom)
        for a in n.names
        if f"{n.module}.{a.name}" in modules
    }
    for n in ast.walk(module.tree):
        if (
            isinstance(n, ast.Call)
            and last_name(n.func) in ("setattr", "object", "patch")
            and n.args
        ):
            path = text_of(n.args[0])
            if path is not None and path.startswith("allocator."):
                yield path, module.at(n, path)
            elif last_name(n.args[0]) in imported and len(n.args) > 1:
                name = ast.unparse(n.args[1])
                yield f"{last_name(n.args[0])}.{name}", module.at(n, ast.unparse(n.args[0]) + name)


# -- the table


def figures(root: Path) -> dict[str, tuple[str, list[str]]]:
    """Every figure, and the places behind it."""
    modules = [Module(p, root) for p in sorted((root / "allocator").rglob("*.py"))]
    tests = [Module(p, root) for p in sorted((root / "tests").rglob("*.py"))]
    keys, own = config_keys(root), defined_names(modules)
    out: dict[str, tuple[str, list[str]]] = {}

    def files(title: str, found: dict[str, list[str]]) -> None:
        found = {k: v for k, v in found.items() if v}
        out[title] = str(len(found)), [x for v in found.values() for x in v]

    def places(title: str, found: list[str]) -> None:
        out[title] = (
            f"{len(found)} in {len({x.split(':')[0] for x in found})} files" if found else "0",
            found,
        )

    outside = [m for m in modules if not inside(m, "families")]
    files(
        "files outside families/ that read config keys or test model types",
        {m.name: [*reads_config(m, keys), *tests_model_type(m)] for m in outside},
    )
    files(
        "files outside codecs/, formats/ and the gguf runtime that name ggml",
        {m.name: [*names_ggml(m)] for m in modules
         if not inside(m, "codecs", "formats", *GGUF_RUNTIME)},
    )  # fmt: skip
    places(
        "container tests outside the runtimes' folders",
        [x for m in modules if not inside(m, *RUNTIMES) for x in tests_container(m)],
    )
    places(
        "getattr and hasattr of a constant name",
        [x for m in modules for x in attribute_protocols(m)],
    )
    places("signatures with **name: Any", [x for m in modules for x in any_options(m)])
    files(
        "files with private names of Optuna", {m.name: [*optuna_private(m, own)] for m in modules}
    )

    folders = {m.name.split("/")[1] for m in modules if m.name.count("/") > 1}
    lone = [m.name for m in modules if m.name.count("/") == 1 and not m.name.endswith("__.py")]
    out["packages"] = str(len(folders)), sorted(folders)
    out["modules outside packages"] = str(len(lone)), lone
    found, order = arrows(modules), declared_order(root)
    up = [x for (a, b), at in found.items() for x in at if order.get(b, 0) > order.get(a, 1 << 30)]
    places("imports that run up, against tests/test_imports.py", up)
    rings = circles(set(found))
    out["circles of packages"] = str(len(rings)), [" ".join(r) for r in rings]
    long = sorted(((m.text.count("\n"), m.name) for m in modules), reverse=True)
    long = [(n, name) for n, name in long if n > N_LINES]
    out[f"modules above {N_LINES} lines"] = str(len(long)), [f"{n} {name}" for n, name in long]

    functions = [
        (m, n, f, ast.get_docstring(f) or "") for m in modules for n, f in public_functions(m)
    ]
    odd = [
        m.at(f, f"{n}: {d.splitlines()[0] if d else '-'}")
        for m, n, f, d in functions
        if not begins_with_verb(d)
    ]
    share = 100 - 100 * len(odd) / len(functions)
    out["public functions whose docstring begins with a verb"] = (
        f"{share:.0f} % of {len(functions)}", odd,
    )  # fmt: skip
    arrays = [(m, n, f, d) for m, n, f, d in functions if has_arrays(f)]
    bare = [m.at(f, n) for m, n, f, d in arrays if not SHAPE.search(d)]
    share = 100 - 100 * len(bare) / len(arrays)
    out["public functions of arrays whose docstring has shapes"] = (
        f"{share:.0f} % of {len(arrays)}", bare,
    )  # fmt: skip

    paths = {
        m.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for m in modules
    }
    for title, each in (
        ("private names of allocator that tests reach", lambda m: private_reaches(m, own)),
        ("names of allocator's modules that tests patch", lambda m: patched_names(m, paths)),
    ):
        pairs = [pair for m in tests for pair in each(m)]
        out[title] = (
            f"{len({name for name, _ in pairs})} ({len(pairs)} times)",
            [x for _, x in pairs],
        )
    return out


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[3])
    parser.add_argument("--list", action="store_true", help="the places behind every figure")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    found = figures(args.checkout)
    if args.json:
        print(json.dumps({title: value for title, (value, _) in found.items()}, indent=1))
        return 0
    for title, (value, at) in found.items():
        print(f"{title:70s} {value}")
        for place in at if args.list else ():
            print(f"    {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
