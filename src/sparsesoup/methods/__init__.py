"""Pruning methods by name, in the table METHODS.

A method is a frozen dataclass with a plan, a subclass of Method. `METHODS["isp"]` is a complete value;
`dataclasses.replace(METHODS["isp"], stages=3)` is another. Other packages add methods through entry points of the
group `sparsesoup.methods`, each a MethodInfo.
"""

from dataclasses import dataclass, fields
from typing import Any, cast

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block
from sparsesoup.core.plugins import load_plugins
from sparsesoup.methods.base import Method as Method
from sparsesoup.methods.early_bird import EarlyBird
from sparsesoup.methods.from_ticket import FromTicket
from sparsesoup.methods.gradient_flow import GradientFlow
from sparsesoup.methods.gradual import GradualPruning, GradualStar
from sparsesoup.methods.gradual_obs import GradualOBS
from sparsesoup.methods.grain import Grain
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.methods.imp import IterativeMagnitudePruning
from sparsesoup.methods.instant_model_soup import InstantModelSoup
from sparsesoup.methods.isp import InstantSoup
from sparsesoup.methods.isp_code import InstantSoupCode
from sparsesoup.methods.isp_paper import InstantSoupPaper
from sparsesoup.methods.lottery_pools import LotteryPools
from sparsesoup.methods.mlpruning import MlPruning
from sparsesoup.methods.model_soup import ModelSoup
from sparsesoup.methods.movement import MagnitudeStraightThrough, MovementPruning
from sparsesoup.methods.one_shot import DenseFinetuning, OneShot
from sparsesoup.methods.pela import Pela
from sparsesoup.methods.pins import Pins
from sparsesoup.methods.platon import Platon
from sparsesoup.methods.powerpropagation import PowerPropagation
from sparsesoup.methods.progressive_distillation import SparseProgressiveDistillation
from sparsesoup.methods.pruning_at_init import Grasp, Snip
from sparsesoup.methods.soft_movement_and_l0 import HardConcreteL0, SoftMovement
from sparsesoup.methods.sparse_soup import SparseModelSoup
from sparsesoup.methods.sparsegpt import SparseGpt
from sparsesoup.methods.wanda import Wanda


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """A row of the table of methods.

    Args:
        method: the method with its default settings.
        family: family of the method.
        score: importance score of a weight.
        summary: one-line description.
        cost: steps in units of T, the steps of one normal fine-tuning.
        source: publication.
        dense: the result keeps all weights.
        returns: pruned weights may return until the masks are final.
        with_teacher: the method has its own teacher: its best model so far, or one that it trains first.
        grouped: weights are pruned in groups larger than one, so the sparsity is that of the nearest group boundary.
        fixed: settings that define this row; they cannot be changed.
    """

    method: Method
    family: str
    score: str
    summary: str
    cost: str = "1"
    source: str = ""
    dense: bool = False
    returns: bool = False
    with_teacher: bool = False
    grouped: bool = False
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or type(self.method).plan is Method.plan:
            raise UserError(f"{self.method!r} is no method: a subclass of Method with a plan(size, sparsity) is needed")


SOUP = ("weak_masks", "look_ahead", "budget", "protocols", "moments", "merge")

# fmt: off
TABLE: dict[str, MethodInfo] = {
    "dense": MethodInfo(method=DenseFinetuning(), family="baseline", score="none", summary="no pruning", dense=True),
    "random": MethodInfo(
        method=OneShot(score="random"), family="baseline", score="uniform",
        summary="a random mask, then training: the control", source="Jaiswal 2023, table 3", fixed=("score",),
    ),
    "magnitude": MethodInfo(
        method=OneShot(), family="one-shot", score="|theta_0|", summary="prune once, then train",
        source="Han 2015; Chen 2020", fixed=("score",),
    ),
    "snip": MethodInfo(
        method=Snip(), family="one-shot", score="|theta_0 g|",
        summary="prune once by the loss's sensitivity, then train", cost="1 + batches / T", source="Lee 2019",
    ),
    "grasp": MethodInfo(
        method=Grasp(), family="one-shot", score="|theta_0 (H g)|",
        summary="prune once by the gradient's norm, then train", cost="1 + 4 batches / T",
        source="Wang 2020; Lubana & Dick 2021",
    ),
    "wanda": MethodInfo(
        method=Wanda(), family="one-shot", score="|theta_0| ||x||",
        summary="prune each row once by weight times input, then train", cost="1 + batches / 3 T", source="Sun 2024",
    ),
    "sparsegpt": MethodInfo(
        method=SparseGpt(), family="one-shot", score="w^2 / [H^-1]_jj, H = sum x x^T",
        summary="prune block by block, update the kept weights, then train", cost="1 + blocks batches / 3 T",
        source="Frantar & Alistarh 2023",
    ),
    "one-shot-structured": MethodInfo(
        method=OneShot(structure="heads-and-units", scope="tensor"), family="one-shot",
        score="mean |theta_0| of a group", summary="whole heads and units cut once, then training",
        source="Caccia 2023", grouped=True, fixed=("score",),
    ),
    "gradual": MethodInfo(
        method=GradualPruning(), family="gradual", score="|w|", summary="on a cubic schedule while training",
        source="Zhu & Gupta 2017",
    ),
    "gmp-star": MethodInfo(
        method=GradualStar(), family="gradual", score="|w|", summary="large first step, rate rewound at each pruning",
        source="Kurtic 2022",
    ),
    "gradual-obs": MethodInfo(
        method=GradualOBS(), family="gradual", score="w^2 average(g^2)",
        summary="by the loss; kept weights are refitted to each layer", cost="1 + prunings (batches / 3 + fit) / T",
        source="LeCun 1990; Hassibi & Stork 1993", returns=True,
    ),
    "power-propagation": MethodInfo(
        method=PowerPropagation(), family="gradual", score="|v|, w = sign(v)|v|^alpha",
        summary="gradual, trained through a power", source="Schwarz 2021",
    ),
    "platon": MethodInfo(
        method=Platon(), family="gradual", score="averages I U of |g w|", summary="by importance and its uncertainty",
        source="Zhang 2022", returns=True,
    ),
    "pins": MethodInfo(
        method=Pins(), family="gradual", score="averages I U of |g (w - rate g)|",
        summary="platon with self-distillation", cost="1, and a teacher's forward", source="Ren & Zhu 2023",
        returns=True, with_teacher=True,
    ),
    "sparse-progressive-distillation": MethodInfo(
        method=SparseProgressiveDistillation(), family="gradual", score="|w|",
        summary="a copy of a teacher is pruned among its blocks", cost="2, and a teacher's forward",
        source="Huang 2022", with_teacher=True,
    ),
    "grain": MethodInfo(
        method=Grain(), family="gradual", score="average of |sum g w|, a group",
        summary="features of heads and units, in one ranking", source="Yang 2023", grouped=True,
    ),
    "gradient-flow": MethodInfo(
        method=GradientFlow(), family="gradual", score="|w g|; by measure",
        summary="rounds of training and pruning by gradient flow", cost="1 + rounds batches / T",
        source="Lubana & Dick 2021",
    ),
    "early-bird": MethodInfo(
        method=EarlyBird(), family="early", score="|w| when the mask settles",
        summary="train until the mask settles, rewind, train it", cost="1 + search, at most 1.5",
        source="You 2019; Jaiswal 2023",
    ),
    "imp": MethodInfo(
        method=IterativeMagnitudePruning(), family="iterative", score="|theta_T|",
        summary="rounds of train, prune, rewind to theta_0",
        cost="rounds + 1", source="Frankle & Carbin 2019", fixed=("rewind", "back"),
    ),
    "imp-rewind": MethodInfo(
        method=IterativeMagnitudePruning(rewind=0.05), family="iterative", score="|theta_T|",
        summary="imp, rewinding to 5 % of T",
        cost="rounds + 1", source="Frankle 2020", fixed=("back",),
    ),
    "lr-rewind": MethodInfo(
        method=IterativeMagnitudePruning(rewind=0.05, back="rate"), family="iterative", score="|theta_T|",
        summary="imp, rewinding only the rate", cost="rounds + 1", source="Renda 2020", fixed=("back",),
    ),
    "lottery-pools": MethodInfo(
        method=LotteryPools(), family="iterative", score="|mixture of tickets|",
        summary="tickets of imp-rewind's rounds, interpolated", cost="rounds + 1 + beyond, and validations",
        source="Yin 2022", returns=True,
    ),
    "ticket": MethodInfo(
        method=FromTicket(), family="given", score="the ticket's",
        summary="train a given ticket's masks, on any dataset", source="Chen 2020",
    ),
    "isp": MethodInfo(
        method=InstantSoup(), family="soup", score="votes, then |theta_C|",
        summary="consensus of weak masks, stage by stage", cost="1 (weak steps included)", source="Jaiswal 2023",
    ),
    "isp-no-soup": MethodInfo(
        method=InstantSoup(weak_masks=0), family="soup", score="|w|", summary="isp's schedule, plain magnitude",
        source="Jaiswal 2023, ablation", fixed=SOUP,
    ),
    "isp-paper": MethodInfo(
        method=InstantSoupPaper(), family="soup", score="|w|", summary="isp as in the paper",
        cost="1 + stages N C / T", source="Jaiswal 2023",
    ),
    "isp-code": MethodInfo(
        method=InstantSoupCode(), family="soup", score="|w|", summary="isp as in its code",
        cost="1 + stages N C / T", source="its released code",
    ),
    "movement": MethodInfo(
        method=MovementPruning(), family="movement", score="learned", summary="top of learned scores at every step",
        source="Sanh 2020 (MvP)", returns=True,
    ),
    "soft-movement": MethodInfo(
        method=SoftMovement(), family="movement", score="learned",
        summary="learned scores above a threshold, penalised", source="Sanh 2020 (SMvP)", returns=True,
    ),
    "l0": MethodInfo(
        method=HardConcreteL0(), family="movement", score="log alpha",
        summary="hard concrete gates, penalised, then folded", source="Louizos 2018", returns=True,
    ),
    "magnitude-ste": MethodInfo(
        method=MagnitudeStraightThrough(), family="movement", score="|w|",
        summary="top |w| at every step, masked weights still trained", source="Sanh 2020 (MaP)", returns=True,
    ),
    "block-movement": MethodInfo(
        method=SoftMovement(pattern=Block(32, 32)), family="movement", score="learned, a block",
        summary="soft movement of 32 x 32 blocks", source="Lagunas 2021 (block)", returns=True, grouped=True,
    ),
    "hybrid-movement": MethodInfo(
        method=HybridMovement(), family="movement", score="learned, a group",
        summary="blocks or heads, and feed-forward units", source="Lagunas 2021 (hybrid)", returns=True, grouped=True,
    ),
    "hybrid-filled": MethodInfo(
        method=HybridMovement(refill=1.0), family="movement", score="learned, a group",
        summary="hybrid, kept groups refilled, trained further", cost="1 + refill = 2",
        source="Lagunas 2021 (hybrid, filled)", returns=True, grouped=True,
    ),
    "mlpruning": MethodInfo(
        method=MlPruning(), family="movement", score="learned, a group, and shares",
        summary="heads and rows, then blocks, at learned shares", cost="1 + blocks = 2", source="Yao 2021",
        returns=True, grouped=True,
    ),
    "sparse-model-soup": MethodInfo(
        method=SparseModelSoup(), family="soup", score="|w| of an average",
        summary="retrainings of one mask averaged, phase by phase", cost="1 + phases m retrain = 2.8",
        source="Zimmer 2024",
    ),
    "instant-model-soup": MethodInfo(
        method=InstantModelSoup(), family="soup", score="none",
        summary="pruned forks averaged into theta_0, then training", cost="1 (weak steps included)",
        source="Jaiswal 2023", dense=True,
    ),
    "pela": MethodInfo(
        method=Pela(), family="low rank", score="singular values",
        summary="two thin layers for each one, merged back", cost="1, less by rank, and a teacher's forward",
        source="Guo 2024", dense=True, with_teacher=True,
    ),
    "model-soup": MethodInfo(
        method=ModelSoup(), family="soup", score="none", summary="several fine-tunings averaged", cost="m = 3",
        source="Wortsman 2022", dense=True,
    ),
}
# fmt: on

TABLE |= load_plugins("sparsesoup.methods", MethodInfo, TABLE)
METHODS: dict[str, Method] = {name: row.method for name, row in TABLE.items()}


def row_of(method: Method) -> str:
    """Return the name of the row of a method: of its class, with the row's fixed settings.

    If several rows match, return the one whose defaults differ from the method in the fewest settings.

    >>> row_of(InstantSoup(stages=3)), row_of(InstantSoup(weak_masks=0))
    ('isp', 'isp-no-soup')

    Raises: UserError if no row has that class.
    """

    def differing(own: Method) -> int:
        return sum(getattr(own, f.name) != getattr(method, f.name) for f in fields(cast(Any, own)))

    rows = {
        name: differing(row.method)
        for name, row in TABLE.items()
        if type(row.method) is type(method)
        and all(getattr(method, name) == getattr(row.method, name) for name in row.fixed)
    }
    if not rows:
        raise UserError(
            f"{type(method).__name__} is no class of a method here; register it as an entry point of "
            f"sparsesoup.methods, or give a name of METHODS"
        )
    return min(rows, key=lambda name: rows[name])
