"""Priors: the formula by hand, a relative that is the model itself, and one of another depth."""

from pathlib import Path

import numpy as np
import pytest

from allocator.checkpoint.outline import planned_inventory
from allocator.decision.search_space import SearchSpace, bind
from allocator.errors import SpaceError
from allocator.families import Role, families
from allocator.formats import FORMATS, OFFERED
from allocator.prediction.priors import ROLE_WEIGHTS, Prior, published, transferred
from allocator.targets import GGUF, TARGETS

CONFIGS = Path(__file__).parents[1] / "data/configs"


@pytest.fixture(scope="module")
def qwen():
    layout = GGUF.layout(planned_inventory(CONFIGS / "qwen3-30b-a3b.json"))
    return bind(SearchSpace(schema=1), layout, None)


def test_every_role_and_format_has_a_figure():
    roles = {role for family in families() for role in family.roles}
    assert {role for role in roles if role.is_encoded} == set(ROLE_WEIGHTS)
    errors = [FORMATS[n].gaussian_error for n in OFFERED if FORMATS[n].block == 256]
    assert errors == sorted(errors)  # a smaller format loses more


def test_the_formula(qwen):
    surrogate = published().surrogate(qwen)
    params = qwen.complete(qwen.params(qwen.smallest))
    by_hand = 0.0
    for name, group in qwen.layout.groups.items():
        part = 1 if group.layer is None else 1 / 48
        by_hand += ROLE_WEIGHTS[group.role] * FORMATS[qwen.formats[name][-1]].gaussian_error * part
    assert surrogate.predict(params) == pytest.approx(by_hand)
    largest = qwen.complete(qwen.params(qwen.largest))
    assert surrogate.predict(largest) == 0  # all BF16, nothing pruned


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_is_its_own_relative(target, surrogates, spaces):
    mine, space = surrogates[target], spaces[target]
    found = transferred(mine, "itself").surrogate(space)
    for group, rows in mine.error_losses.items():
        counted = ["*" not in v and FORMATS[v].gaussian_error > 0 for v in space.formats[group]]
        np.testing.assert_allclose(found.error_losses[group][-1][counted], rows[-1][counted])
    assert found.coupling == pytest.approx(mine.coupling)
    for layer, losses in mine.count_losses.items():
        np.testing.assert_allclose(found.count_losses[layer], losses, atol=1e-12)


def test_a_deeper_model_loses_as_much_in_all(surrogates, spaces):
    """A role that has one loss in all layers of the relative, in a model with 61 of them."""
    prior = transferred(surrogates["gguf"], "the reference")
    layout = GGUF.layout(planned_inventory(CONFIGS / "deepseek-v3.json"))
    downs = [g for g in layout.groups.values() if g.role is Role.EXPERT_DOWN]
    flat = Prior("", {Role.EXPERT_DOWN: {"": {0.1: 2.0, 0.9: 2.0}}})
    total = sum(flat.loss(g, "IQ1_S", 61) for g in downs)
    assert total == pytest.approx(2.0 * FORMATS["IQ1_S"].gaussian_error * 58 / 61)
    space = bind(SearchSpace(schema=1), layout, None)
    deep = prior.surrogate(space)
    share = 192 / 256
    theirs = sum(
        np.interp(share * 24, spaces["gguf"].counts, losses)
        for losses in surrogates["gguf"].count_losses.values()
    )
    ours = sum(v[space.counts.index(192)] for v in deep.count_losses.values())
    assert ours == pytest.approx(theirs * 58 / 61 * 6 / 5, rel=0.1)  # shares of routed layers


def test_roles_that_a_relative_lacks(surrogates, qwen):
    prior = transferred(surrogates["gguf"], "the reference")
    assert prior.weights[Role.Q] == prior.weights[Role.Q_B]
    assert prior.weights[Role.HEAD] == prior.weights[Role.EMBEDDING]
    assert np.isfinite(prior.surrogate(qwen).error_losses["layers.0.attention.v"]).all()
    with pytest.raises(SpaceError, match=r"nothing is known of experts\.up"):
        Prior("a", {}).loss(qwen.layout.groups["layers.0.experts.up"], "Q8_0", 48)
