"""Settings of the finishing stage, and the digest of everything that finished weights depend on.

In: what a user asks for, or what a record says. Out: a frozen `Recipe`. Invariant: the same inputs
finished twice, on one kind of processor and number of threads, give the same bytes; a recipe that a
newer version wrote is refused by the name of its unknown setting.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from allocator.errors import SpaceError

CODES, SCALES, NORMS, ROUTERS = "codes", "scales", "norms", "routers"
PARTS = (CODES, SCALES, NORMS, ROUTERS)
"""What finishing may change."""
METHOD = 2


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are finished.

    Attributes:
        moments_tokens: search tokens behind the second moments, at most.
        tuning_tokens: search tokens that are tuned on, at most; 0 tunes nothing.
        fisher: tokens are weighted by the squared gradient at a product's output.
        damping: share of a moment's mean diagonal that is added to the diagonal.
        shrink_tokens: tokens that a layer's mean moment counts as in every expert's own.
        rounds: of coordinate descent over codes, sub-scales and scales.
        gain: share of the gain that rounding takes from a row which its scales give back.
        rate: relative change of a tuning step; None derives it from the loss before.
        seed: of the labels that are drawn for the squared gradients.
        parts: what is changed, of `PARTS`.
        streamed: second moments are measured layer by layer, then without Fisher weights, and
            tuning is layer by layer, too.
        stopped_steps: tuning steps after which a time limit ended tuning; None without one.
        method: version of the method; another one gives other weights.
    """

    moments_tokens: int = 65_536
    tuning_tokens: int = 61_440
    fisher: bool = True
    damping: float = 0.05
    shrink_tokens: int = 1024
    rounds: int = 1
    gain: float = 0.75
    rate: float | None = None
    seed: int = 0
    parts: tuple[str, ...] = PARTS
    streamed: bool = False
    stopped_steps: int | None = None
    method: int = METHOD

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str) -> "Recipe":
        """Reads a recipe from plain data.

        Args:
            data: as of `to_json`.
            where: for messages: the file that the data is from.

        Raises:
            SpaceError: if a setting is unknown or of another type.
        """
        try:
            recipe = msgspec.convert(data, cls)
            recipe.check()
        except (ValueError, SpaceError) as error:
            raise SpaceError(
                f"{where}: recipe of the finished weights: {error}; use the version that wrote it"
            ) from None
        return recipe

    def check(self) -> None:
        """Checks the settings.

        Raises:
            SpaceError: naming the first one that cannot be.
        """
        for name, least in (("moments_tokens", 1), ("tuning_tokens", 0), ("rounds", 1)):
            if (value := getattr(self, name)) < least:
                raise SpaceError(f"{name} {value}: needed {least} or more")
        if not 0 <= self.gain <= 1:
            raise SpaceError(f"gain {self.gain}: needed 0 to 1")
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise SpaceError(f"parts {', '.join(self.parts)}: needed some of {', '.join(PARTS)}")
        if self.streamed and self.fisher:
            raise SpaceError("a streamed model has no Fisher weights")
        if self.method != METHOD:
            raise SpaceError(f"method {self.method}, this version has {METHOD}")

    @property
    def layer_by_layer(self) -> "Recipe":
        """The same for a model that is streamed."""
        return msgspec.structs.replace(self, streamed=True, fisher=False)

    @property
    def tunes(self) -> bool:
        """Whether anything is tuned after the codes."""
        return self.tuning_tokens > 0 and bool(set(self.parts) - {CODES})

    @property
    def codes_alone(self) -> "Recipe":
        """The same without everything that codes do not depend on."""
        return msgspec.structs.replace(
            self, tuning_tokens=0, rate=None, parts=(CODES,), stopped_steps=None
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, as in records and artifacts."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return json.loads(json.dumps(plain))  # type: ignore[no-any-return]  # lists for tuples


def inputs_digest(recipe: Recipe, **others: str) -> str:
    """Returns the sha256 that names finished weights before they are made.

    Args:
        recipe: the settings.
        others: digests of the other inputs by name: allocation, checkpoint, importance, codec,
            documents.
    """
    named = {"recipe": recipe.to_json(), **others, "schema": 1}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
