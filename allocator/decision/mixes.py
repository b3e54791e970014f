"""Mixes: two formats for the routed experts of one projection, as a search writes them.

In: a choice such as `IQ2_XXS*8+IQ1_S`, which stores the first 8 experts of a layer's ranking in
IQ2_XXS and the other retained ones in IQ1_S; or a plain format. Out: formats and numbers of
experts. Invariant: the numbers of `split` sum to the experts that are retained.

An allocation names experts instead (`formats.parts`): `IQ2_XXS:0,3,5+IQ1_S:1,2`.
"""

from functools import cache

from allocator.formats import in_parts


@cache
def split(value: str, count: int) -> tuple[tuple[str, int], ...]:
    """Returns the formats of a choice, and how many of `count` experts each stores, best first."""
    head, star, rest = value.partition("*")
    if not star:
        return ((value, count),)
    n_head, _, tail = rest.partition("+")
    n = int(n_head)
    return ((head, count),) if count <= n else ((head, n), (tail, count - n))


def mix(head: str, n_head: int, tail: str) -> str:
    """Returns the choice that stores the first `n_head` experts in `head`, the others in `tail`."""
    return f"{head}*{n_head}+{tail}"


def canonical(value: str, count: int) -> str:
    """Returns a choice as an allocation shows it: a mix of one part is a plain format."""
    stored = split(value, count)
    return stored[0][0] if len(stored) == 1 else value


def choice_of(text: str) -> str:
    """Returns the choice that gives a group's format in an allocation: `A:0,3+B:1` is `A*2+B`.

    Text that no choice gives comes back unchanged.
    """
    pieces = [piece.partition(":") for piece in text.split("+")]
    if len(pieces) != 2 or not in_parts(text):
        return text
    (head, _, experts), (tail, _, _) = pieces
    return mix(head, experts.count(",") + 1, tail)
