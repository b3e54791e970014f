"""Solving again for finished weights: factors by brute force, prices by hand, a record."""

import shutil
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from allocator import api
from allocator.app import finish_stage
from allocator.app.finish_stage import FinishRequest
from allocator.app.resolve import budget_of, option_factors, resolve
from allocator.app.resources import Resources
from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation_record import AllocationRecord
from allocator.decision.mixes import split
from allocator.errors import SpaceError, StudyError
from allocator.finishing import factors as measured
from allocator.finishing import finish as stage
from allocator.finishing.recipe import CODES, Recipe
from allocator.finishing.tuning import TuningSettings
from allocator.formats import format_named
from allocator.scoring.swap_model import token_ids

TOKENS = 256


@pytest.fixture(scope="module")
def study(finished_study, tmp_path_factory):
    """A copy of a finished study; read only."""
    return Path(shutil.copytree(finished_study, tmp_path_factory.mktemp("resolve") / "study"))


@pytest.fixture(scope="module")
def options(study_cache, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    for folder in study_cache.iterdir():
        if folder.name != "finish":
            (cache / folder.name).symlink_to(folder)
    return {"cache": cache, "threads": 1}


def finisher_of(study, allocation, options, **settings):
    """The study folder, the record, a finisher of it, and the encodings of its weights."""
    folder = StudyFolder(study, **options)
    record = AllocationRecord.read(allocation)
    recipe = Recipe(moments_tokens=TOKENS, tuning_tokens=0, parts=(CODES,), **settings)
    finisher = finish_stage._finisher(
        folder, record.decision, record.importance, recipe, allocation, None
    )
    return folder, record, finisher, folder.encodings.of(record.importance, beside=allocation)


# -- factors


def inputs_of(model, module, documents):
    """What a linear layer multiplies, `(tokens, in)`."""
    rows = []
    handle = module.register_forward_pre_hook(lambda _, x: rows.append(x[0].flatten(0, -2)))
    with torch.inference_mode():
        for document in documents:
            model(input_ids=token_ids(model, [document]))
    handle.remove()
    return torch.cat(rows).double().numpy()


def test_factors_are_those_of_the_outputs_on_documents_that_chose_nothing(study, options):
    allocation = study / "allocations/pick.json"
    folder, record, finisher, encodings = finisher_of(study, allocation, options, fisher=False)
    found = measured.measured_factors(finisher, encodings)
    assert set(found) == set(folder.layout.groups)
    assert all(0 <= x <= 1 for x in found.values())
    assert sum(x < 0.95 for x in found.values()) > 3
    documents = stage.first_tokens(finisher.documents.search, TOKENS)
    assert len(documents) > 1
    n_checked = 0
    for layer in (0, 1):
        name = f"layers.{layer}.attention.o"
        model = finisher.model.model
        module = model.model.layers[layer].self_attn.o_proj
        with finisher.model.original():
            choosing, judging = (
                inputs_of(model, module, d) for d in (documents[::2], documents[1::2])
            )
            weights = module.weight.detach().float()
        fmt = record.decision.parts(folder.layout, name)[0][0]
        block_format = measured._block_format(fmt)
        if block_format is None:
            continue
        moments = choosing.T @ choosing / len(choosing)
        moments += finisher.recipe.damping * moments.diagonal().mean() * np.eye(len(moments))
        data = torch.from_numpy(np.array(encodings.encoded(name, fmt.name)))
        chosen = stage.choose(
            weights[None], data[None], block_format, torch.from_numpy(moments).float()[None]
        ).data[0]
        before, after = (
            np.square(judging @ (weights - block_format.values(x)).double().numpy().T).sum()
            for x in (data, chosen)
        )
        assert found[name] == pytest.approx(min(after / before, 1.0), rel=1e-3)
        n_checked += found[name] < 1
    assert n_checked


def test_factors_are_measured_once(study, options, monkeypatch):
    allocation = study / "allocations/pick.json"
    first = measured.measured_factors(*finisher_of(study, allocation, options)[2:])
    monkeypatch.setattr(measured, "_measure", None)
    assert measured.measured_factors(*finisher_of(study, allocation, options)[2:]) == first
    with pytest.raises(TypeError):  # of other settings they are others
        measured.measured_factors(*finisher_of(study, allocation, options, seed=1)[2:])


# -- prices


def test_an_option_without_codes_of_its_own_keeps_its_loss(study, options):
    space = StudyFolder(study, **options).space
    group = "layers.0.experts.up"
    factors = option_factors(space, {group: 0.25})
    n = space.counts[-1]
    for name, value in zip(space.formats[group], factors[group], strict=True):
        kept = sum(
            k for fmt, k in split(name, n) if format_named(fmt).name in ("BF16", "F16", "F32")
        )
        assert value == pytest.approx(0.25 + 0.75 * kept / n), name
    assert {0.25, 1.0} <= set(factors[group])
    assert all((x == 1).all() for g, x in factors.items() if g != group)


def test_scaled_prices_by_hand(surrogates):
    surrogate = surrogates["gguf"].multiplied({"layers.1.experts.up": 2.0})
    rng, space = np.random.default_rng(0), surrogates["gguf"].space
    factors = {g: rng.uniform(0.2, 1, len(v)) for g, v in list(space.formats.items())[::2]}
    scaled = surrogate.scaled(factors)
    params = {n: v[rng.integers(len(v))] for n, v in space.choices.items()}
    total, squares = 0.0, 0.0
    for name, loss in zip(surrogate.multiplied_names, surrogate.losses(params), strict=True):
        if name in factors:
            loss *= factors[name][space.formats[name].index(params[space.format_params[name]])]
        total += loss
        squares += surrogate.coupling.get(name, 0.0) * loss
    assert scaled.predict(params) == pytest.approx(total + np.sqrt(squares))
    assert scaled.predict(params) < surrogate.predict(params)


def bits_of(allocation, layout, group):
    parts = allocation.parts(layout, group)
    return sum(f.bits * max(len(e), 1) for f, e in parts) / sum(max(len(e), 1) for _, e in parts)


def test_bytes_go_where_finishing_helps_least(study, options, monkeypatch):
    allocation = study / "allocations/pick.json"
    folder, record, finisher, encodings = finisher_of(study, allocation, options)
    budget = budget_of(folder, record.decision, record)
    assert budget == folder.budget()
    alone = {"layers.0.experts.up", "layers.1.experts.down"}

    def solved(factors):
        monkeypatch.setattr(measured, "measured_factors", lambda *_: factors)
        return resolve(folder, record.decision, budget, finisher, encodings)

    plain = solved({})
    helped = solved({g: 0.02 for g in folder.layout.groups if g not in alone})
    for result in (plain, helped):
        assert result.allocation.fits(folder.layout, budget)
        assert result.predicted <= result.given
    assert helped.given < plain.given
    gains = [
        bits_of(helped.allocation, folder.layout, g) - bits_of(plain.allocation, folder.layout, g)
        for g in alone
    ]
    assert min(gains) >= 0
    assert max(gains) > 0


# -- whole


@pytest.fixture(scope="module")
def finished(study, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "TuningSettings", partial(TuningSettings, batch_tokens=64))
        given = (study / "allocations/pick.json").read_bytes()
        result = api.finish(
            study, study / "allocations/pick.json", tokens=TOKENS, resolve=True, **options
        )
        assert (study / "allocations/pick.json").read_bytes() == given
        return result


def test_a_record_of_its_own_within_the_same_limits(study, finished, options):
    assert finished.record == study / "allocations/pick-resolved.json"
    given = AllocationRecord.read(study / "allocations/pick.json")
    record = AllocationRecord.read(finished.record)
    assert record.kind == "resolved"
    assert record.bytes["budget"] == given.bytes["budget"] >= record.bytes["encoded"]
    assert record.finished.after["selection"] <= record.finished.before["selection"]
    assert finished.resolved.predicted <= finished.resolved.given
    assert finished.resolved.allocation == record.decision
    assert api.score(study, finished.record, **options)["loss"] == finished.after["search"]


def test_a_format_is_solved_again_at_its_own_bytes(study, options):
    request = FinishRequest(
        study, Path("Q4_0"), recipe=msgspec.structs.replace(Recipe(), moments_tokens=TOKENS),
        resources=Resources.of(options), resolve=True,
    )  # fmt: skip
    again = finish_stage._Stage(request)
    assert again._path == study / "allocations/Q4_0-resolved.json"
    folder = StudyFolder(study, **options)
    plain = folder.read_allocation("Q4_0")
    again.resolve()
    size = plain.nbytes(folder.layout).file
    assert again._allocation != plain
    assert again._allocation.nbytes(folder.layout).file <= size
    assert again._resolved.budget.nbytes == size


def test_what_cannot_be_solved_again_is_refused_first(study, options, tmp_path):
    streamed = Path(shutil.copytree(study, tmp_path / "study"))
    text = (streamed / "study.toml").read_text()
    checkpoint = StudyFolder(study, **options).inventory.path
    lines = [f'checkpoint = "{checkpoint}"' if x.startswith("checkpoint") else x
             for x in text.splitlines()]  # fmt: skip
    (streamed / "study.toml").write_text("\n".join(lines) + "\n[streamed]\n")
    with pytest.raises(StudyError, match="--resolve needs the model in memory"):
        api.finish(streamed, streamed / "allocations/pick.json", resolve=True, **options)
    with pytest.raises(SpaceError, match="holds another allocation"):
        # a search's own record is not written over
        api.finish(
            study, study / "allocations/pick.json", resolve=True, out="pick", tokens=TOKENS,
            **options,
        )  # fmt: skip
