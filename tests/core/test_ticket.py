"""A ticket on disk: round trip, damage, foreign models; and training one again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import Net, same, tiny, watched
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import Target, target_parameters, weights_fingerprint
from sparsesoup.core.ticket import Ticket, find_mask_folder, load_masks, match_parameter_names, save_masks
from sparsesoup.methods import METHODS, FromTicket
from sparsesoup.methods.gradual import GradualPruning
from sparsesoup.training.problem import Problem

MASKS: Masks = {"b.w": torch.arange(15).reshape(3, 5) % 3 == 0, "a.w": torch.tensor([[True], [False]])}


def headed(**header: Any) -> dict[str, str]:
    """The header of a masks file: one entry, so that the same masks are the same bytes."""
    return {"sparsesoup": json.dumps({"format": "1", **header})}


def test_the_same_masks_are_the_same_bytes(tmp_path: Path) -> None:
    masks = {f"w{i}": torch.eye(5) > 0 for i in range(4)}
    for name in "abcdefgh":
        save_masks(tmp_path / name, masks, {"seed": 3})
    assert len({(tmp_path / name / "masks.safetensors").read_bytes() for name in "abcdefgh"}) == 1


def saved(folder: Path, **facts: Any) -> Path:
    save_masks(folder, MASKS, facts)
    return folder


def test_masks_and_facts_come_back_as_they_were(tmp_path: Path) -> None:
    masks, facts = load_masks(saved(tmp_path / "pruning", method="isp", seed=3))
    assert same(masks, MASKS)
    assert list(masks) == list(MASKS)
    assert facts == {"method": "isp", "seed": 3, "format": "1", "kept": 6, "total": 17}
    assert load_file(tmp_path / "pruning" / "masks.safetensors")["b.w"].numel() == 2  # one bit a weight
    assert {f.name for f in (tmp_path / "pruning").iterdir()} == {"masks.safetensors", "ticket.json"}


@pytest.mark.parametrize("where", ["", "pruning", "model/pruning"])
def test_a_ticket_is_found_in_a_run_directory_a_model_or_its_own_folder(where: str, tmp_path: Path) -> None:
    saved(tmp_path / where)
    assert find_mask_folder(tmp_path) == tmp_path / where
    assert same(load_masks(tmp_path)[0], MASKS)


def test_no_ticket_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no ticket at .*: expected a run directory, .* with masks\.safetensors$"):
        load_masks(tmp_path)


def damage(folder: Path, how: str) -> None:
    masks, facts = folder / "masks.safetensors", folder / "ticket.json"
    told = json.loads(facts.read_text())
    bits = load_file(masks)
    shapes = {n: list(m.shape) for n, m in MASKS.items()}
    header = headed(shapes=shapes)
    if how == "truncated":
        masks.write_bytes(masks.read_bytes()[:-3])
    elif how == "empty":
        masks.write_bytes(b"")
    elif how == "flipped":
        save_file({n: b ^ 128 for n, b in bits.items()}, masks, metadata=header)
    elif how == "name gone":
        save_file({"b.w": bits["b.w"]}, masks, metadata=header)
    elif how == "wrong shape":
        save_file(bits, masks, metadata=headed(shapes=shapes | {"b.w": [3, 9]}))
    elif how == "no shapes":
        save_file(bits, masks, metadata=headed())
    elif how == "counts":
        facts.write_text(json.dumps(told | {"kept": 7}))
    elif how == "counts gone":
        facts.write_text(json.dumps({"format": "1"}))
    elif how == "facts truncated":
        facts.write_text(facts.read_text()[:-5])
    elif how == "facts gone":
        facts.unlink()
    elif how == "facts no table":
        facts.write_text("[1]")


DAMAGES = ["truncated", "empty", "flipped", "name gone", "wrong shape", "no shapes"]
FACTS_DAMAGES = ["counts", "counts gone", "facts truncated", "facts gone", "facts no table"]


@pytest.mark.parametrize("how", DAMAGES + FACTS_DAMAGES)
def test_a_damaged_ticket_is_refused_in_one_line_that_names_the_file(how: str, tmp_path: Path) -> None:
    damage(saved(tmp_path), how)
    with pytest.raises(UserError, match=r"^damaged ticket: .*copy (it|both) again$") as caught:
        load_masks(tmp_path)
    assert "\n" not in str(caught.value)
    assert ("ticket.json" if how in FACTS_DAMAGES else "masks.safetensors") in str(caught.value)


def test_another_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    saved(tmp_path)
    save_file(load_file(tmp_path / "masks.safetensors"), tmp_path / "masks.safetensors", metadata=headed(format="7"))
    with pytest.raises(UserError, match=r"has format 7; this version reads 1$"):
        load_masks(tmp_path)


SHAPES = {"b.w": torch.Size((3, 5)), "a.w": torch.Size((2, 1))}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_masks_fit_a_model_with_and_without_its_prefix(inside: bool, outside: bool) -> None:
    masks = {f"bert.{n}" if inside else n: m for n, m in MASKS.items()}
    shapes = {f"bert.{n}" if outside else n: s for n, s in SHAPES.items()}
    found = match_parameter_names(masks, shapes, "bert")
    assert same(found, {f"bert.{n}" if outside else n: m for n, m in MASKS.items()})


def test_foreign_masks_are_refused_by_name_and_shape() -> None:
    with pytest.raises(UserError, match=r"^foreign ticket: it prunes a\.w, which the model does not have"):
        match_parameter_names(MASKS, {"b.w": SHAPES["b.w"]})
    with pytest.raises(UserError, match=r"its mask of b\.w has shape \(3, 5\), the model's weight \(5, 3\)"):
        match_parameter_names(MASKS, SHAPES | {"b.w": torch.Size((5, 3))})
    with pytest.raises(UserError, match=r"it prunes b\.w"):
        match_parameter_names(MASKS, {f"bert.{n}": s for n, s in SHAPES.items()})  # no prefix was named


def keep_ticket(folder: Path, problem: Problem, ticket: Ticket) -> FromTicket:
    save_masks(folder / "pruning", ticket.masks, {"origin": problem.base_fingerprint(), "model": "tiny"})
    return FromTicket(ticket=str(folder))


def test_a_ticket_trained_again_keeps_its_masks_and_its_quality(tmp_path: Path) -> None:
    problem = tiny()
    first = METHODS["magnitude"].run(problem, 0.7)
    again = keep_ticket(tmp_path, problem, first).run(tiny(), 0.7)
    assert same(again.masks, first.masks)
    assert same(again.weights, first.weights)  # magnitude is: put the masks on theta_0 and train
    assert again.notes == {"ticket": str(tmp_path)}
    other = keep_ticket(tmp_path, problem, first).run(tiny(seed=3), 0.7)
    assert same(other.masks, first.masks)
    assert not same(other.weights, first.weights)


def test_a_ticket_pruned_on_stays_within_itself(tmp_path: Path) -> None:
    problem = tiny()
    first = METHODS["gradual"].run(problem, 0.5)
    with watched() as watch:
        further = replace(keep_ticket(tmp_path, problem, first), further=GradualPruning(start=0.2, stop=0.5))
        ticket = further.run(tiny(observer=watch), 0.9)
    assert algebra.count_kept(ticket.masks) == 200
    assert all(not (m & ~first.masks[n]).any() for n, m in ticket.masks.items())
    curve = watch.curve("sparsity")
    assert curve[:12] == [pytest.approx(0.5)] * 12
    assert curve[29:] == [pytest.approx(0.9)] * 31
    assert curve == sorted(curve)
    assert ticket.cost["main"]["steps"] == 60


def test_less_sparsity_than_the_tickets_is_refused(tmp_path: Path) -> None:
    problem = tiny()
    method = keep_ticket(tmp_path, problem, METHODS["magnitude"].run(problem, 0.7))
    with pytest.raises(UserError, match=r"^sparsity 0\.6 is below the ticket's 0\.7000; ask for that or more$"):
        method.run(tiny(), 0.6)


def test_a_ticket_of_another_base_model_is_refused(tmp_path: Path) -> None:
    problem = tiny()
    method = keep_ticket(tmp_path, problem, METHODS["magnitude"].run(problem, 0.7))
    torch.manual_seed(99)
    other = tiny(pretrained=Net())
    with pytest.raises(UserError, match=r"^foreign ticket: .* was made from tiny, whose prunable weights differ"):
        method.run(other, 0.7)
    wider = dict(Net(24).named_parameters())
    grown = replace(
        tiny(pretrained=Net(24)), targets={n: Target("other", tuple(wider[n].shape)) for n in other.targets}
    )
    with pytest.raises(UserError, match=r"^foreign ticket: its mask of .* has shape"):
        method.run(grown, 0.7)


def test_a_ticket_that_says_nothing_of_a_weight_is_refused(tmp_path: Path) -> None:
    problem = tiny()
    masks = METHODS["magnitude"].run(problem, 0.7).masks
    del masks["blocks.1.weight"]
    save_masks(tmp_path, masks, {"origin": problem.base_fingerprint()})
    with pytest.raises(UserError, match=r"^foreign ticket: it says nothing of blocks\.1\.weight$"):
        FromTicket(ticket=str(tmp_path)).run(tiny(), 0.7)


def test_the_tickets_own_weights_are_taken_too(tmp_path: Path) -> None:
    problem = tiny()
    first = METHODS["magnitude"].run(problem, 0.7)
    method = keep_ticket(tmp_path, problem, first)
    own = tiny(steps=4)
    own.pretrained.load_state_dict(first.weights)
    again = method.run(own, 0.7)
    assert same(again.masks, first.masks)


def test_no_path_is_refused() -> None:
    with pytest.raises(UserError, match=r"^method ticket needs method\.ticket PATH"):
        METHODS["ticket"].run(tiny(), 0.5)


def test_targets_are_looked_up_fresh_by_name_in_their_order() -> None:
    net = Net()
    targets = {n: Target("other", tuple(net.get_parameter(n).shape)) for n in ("embed.weight", "wide.weight")}
    turned = dict(reversed(targets.items()))
    assert list(target_parameters(net, turned)) == ["wide.weight", "embed.weight"]
    net.wide.weight = torch.nn.Parameter(torch.zeros(60, 20))
    assert target_parameters(net, targets)["wide.weight"] is net.wide.weight
    with pytest.raises(ValueError, match=r"the model has no parameter gone\.weight"):
        target_parameters(net, {"gone.weight": Target("other", (1, 1))})
    with pytest.raises(ValueError, match=r"wide\.weight has shape \(60, 20\), expected \(20, 60\)"):
        target_parameters(net, {"wide.weight": Target("other", (20, 60))})


def test_a_fingerprint_is_of_names_shapes_and_values_however_they_are_stored() -> None:
    weights: dict[str, Tensor] = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    print_ = weights_fingerprint(weights)
    assert weights_fingerprint(dict(reversed(weights.items()))) == print_
    assert weights_fingerprint({"a": weights["a"].t().contiguous().t(), "b": weights["b"].bfloat16()}) == print_
    changed: list[dict[str, Tensor]] = [{"a": weights["a"]}, {**weights, "a": weights["a"].reshape(3, 2)}]
    changed += [{**weights, "b": torch.tensor([1.0, 1.0001])}, {"c": weights["a"], "b": weights["b"]}]
    assert print_ not in [weights_fingerprint(other) for other in changed]


@pytest.mark.parametrize(("scope", "there", "asked"), [("tensor", 0.5, 0.8), ("row", 0.5, 0.8), ("2:4", 0.3, 0.5)])
def test_masks_of_another_scope_are_refused_before_the_first_step(
    tmp_path: Path, scope: Any, there: float, asked: float
) -> None:
    method = keep_ticket(tmp_path, tiny(), METHODS["magnitude"].run(tiny(), there))
    problem = tiny()
    with pytest.raises(UserError, match=r"the masks given are already|`within` has fewer left"):
        replace(method, further=GradualPruning(scope=scope)).run(problem, asked)
    assert not problem.meter.costs
