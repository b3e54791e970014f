"""What was measured of a checkpoint: the value, its file, and what a search reads from it.

In: `profile.json`. Out: a frozen `Profile`. Invariant: content-addressed by (checkpoint,
calibration tokens, target, saliency, codec), so every study with the same inputs shares it.
"""

from pathlib import Path

import msgspec

from allocator.errors import StudyError
from allocator.files.checksums import unseal
from allocator.targets import Group


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured change of the original: some groups in other formats.

    Attributes:
        bundle: the groups that were changed together, e.g. `layers.3.attention`.
        formats: their formats.
        kl: nats per token.
    """

    bundle: str
    formats: dict[str, str]
    kl: float


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured sensitivities.

    Attributes:
        checkpoint: digest of the source checkpoint.
        calibration: digest of the calibration tokens.
        target: whose layout the groups are in.
        importance: digest of the importance vectors beside this file.
        n_tokens: tokens behind importance and saliency.
        measured_tokens: tokens behind each measured loss.
        curvature_tokens: tokens behind the curvature.
        forward_tokens: what each stage cost, in tokens through all layers.
        saliency: per method, per MoE layer, one value per expert, higher = keep.
        unreached: `(layer, expert)` that no calibration token reached.
        counts: tokens routed to each expert, per MoE layer.
        curvature: per group and format, the second-order loss of that single change, nats per
            token; one value per routed expert, else one value.
        measured: the KL of changed bundles.
        pruned: per MoE layer and retained count, the KL of that single change, nats per token.
        saliency_method: which saliency `pruned` was measured with.
    """

    checkpoint: str
    calibration: str
    target: str
    importance: str
    n_tokens: int
    measured_tokens: int
    curvature_tokens: int
    forward_tokens: dict[str, int]
    saliency: dict[str, dict[int, list[float]]]
    unreached: list[tuple[int, int]]
    counts: dict[int, list[int]]
    curvature: dict[str, dict[str, list[float]]]
    measured: list[Change]
    pruned: dict[int, dict[int, float]]
    saliency_method: str
    schema: int = 2

    @classmethod
    def read(cls, path: Path, of: str = "") -> "Profile":
        """From its file.

        Args:
            path: of the file; one of an earlier form has no checksum.
            of: digest of the inputs that it was measured for.

        Raises:
            StudyError: if the file is no profile, or is damaged.
        """
        try:
            plain = unseal(path.read_bytes(), f"{path.name} {of}")
            return msgspec.convert(plain, cls, strict=False)
        except (OSError, ValueError) as error:
            raise StudyError(
                f"{path}: no profile ({error}); run `allocator profile` again"
            ) from None


def bundle_of(group: Group) -> str:
    """The bundle of a group: a layer's attention, a layer's MLP and experts, or itself."""
    if group.layer is None:
        return group.name
    attention = str(group.role).startswith("attention")
    return f"layers.{group.layer}.{'attention' if attention else 'mlp'}"
