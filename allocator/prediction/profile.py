"""Measurements of a checkpoint, which a search predicts losses from.

In: `profile.json`. Out: a frozen `Profile`. Invariant: a profile is content-addressed by
(checkpoint, calibration tokens, target, saliency, codec), so every study with the same inputs
shares it.
"""

from pathlib import Path

import msgspec

from allocator.errors import StudyError, reason
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
        forward_tokens: tokens through all layers that each stage took.
        saliency: per method and MoE layer, one value per expert; experts of the highest values
            stay.
        unreached: `(layer, expert)` that no calibration token reached.
        counts: tokens routed to each expert, per MoE layer.
        curvature: per group and format, the second-order loss of that single change, nats per
            token; one value per routed expert, else one value.
        measured: the KL of changed bundles.
        pruned: per MoE layer and retained count, the KL of that single change, nats per token.
        saliency_method: the saliency that `pruned` was measured with.
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
        """Reads a profile from its file.

        Args:
            path: of the file; a file of an earlier form has no checksum.
            of: digest of the inputs that the profile was measured for.

        Raises:
            StudyError: if the file is no profile, or is damaged.
        """
        try:
            plain = unseal(path.read_bytes(), f"{path.name} {of}")
            return msgspec.convert(plain, cls, strict=False)
        except (OSError, ValueError) as error:
            raise StudyError(
                f"{path}: no profile ({reason(error)}); run `allocator profile` again"
            ) from None


def bundle_of(group: Group) -> str:
    """Returns the bundle of a group: a layer's attention, its MLP and experts, or the group."""
    if group.layer is None:
        return group.name
    attention = str(group.role).startswith(("attention", "linear", "ssm", "conv"))
    return f"layers.{group.layer}.{'attention' if attention else 'mlp'}"
