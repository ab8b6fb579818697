"""The methods, by name: the table of contents, written by hand.

A method is a frozen dataclass with one verb, `run(problem, sparsity) -> Ticket`. `METHODS["isp"]` is a complete value;
`dataclasses.replace(METHODS["isp"], stages=3)` is another.
"""

from dataclasses import dataclass
from typing import Protocol

from sparsesoup.methods.gradual import Gradual, GradualStar
from sparsesoup.methods.imp import Iterative
from sparsesoup.methods.isp import InstantSoup
from sparsesoup.methods.isp_published import InstantSoupCode, InstantSoupPaper
from sparsesoup.methods.known import FromTicket
from sparsesoup.methods.oneshot import Dense, OneShot
from sparsesoup.problem import Problem
from sparsesoup.ticket import Ticket


class Method(Protocol):
    """A way to find a ticket."""

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Find it: never writes to the pre-trained model, and puts every step on the meter."""


@dataclass(frozen=True)
class Row:
    """A line of the table of methods.

    Args:
        method: the method with its default settings.
        summary: what it does, in one line.
        cost: steps in units of T, the steps of one normal fine-tuning.
        source: where it was published.
        dense: whether its product keeps all weights.
        fixed: settings that make the row what its name says; they cannot be changed.
    """

    method: Method
    summary: str
    cost: str
    source: str
    dense: bool = False
    fixed: tuple[str, ...] = ()


SOUP = ("weak_masks", "look_ahead", "budget", "protocols")

TABLE: dict[str, Row] = {
    "dense": Row(Dense(), "no pruning", "1", "", dense=True),
    "random": Row(
        OneShot(score="random"),
        "a random mask, then training: the control",
        "1",
        "Jaiswal 2023, table 3",
        fixed=("score",),
    ),
    "magnitude": Row(OneShot(), "one-shot |theta_0| before training", "1", "Han 2015; Chen 2020", fixed=("score",)),
    "gradual": Row(Gradual(), "|w| on a cubic schedule while training", "1", "Zhu & Gupta 2017"),
    "gmp-star": Row(GradualStar(), "big first step, rate re-wound (no distillation yet)", "1", "Kurtic 2022"),
    "imp": Row(
        Iterative(),
        "rounds of train, prune, back to theta_0",
        "rounds + 1",
        "Frankle & Carbin 2019",
        fixed=("rewind", "back"),
    ),
    "imp-rewind": Row(
        Iterative(rewind=0.05), "imp, back to step 5 % of T", "rounds + 1", "Frankle 2020", fixed=("back",)
    ),
    "lr-rewind": Row(
        Iterative(rewind=0.05, back="rate"), "imp, only the rate goes back", "rounds + 1", "Renda 2020", fixed=("back",)
    ),
    "ticket": Row(FromTicket(), "train a given ticket's masks, here or elsewhere", "1", "Chen 2020"),
    "isp": Row(InstantSoup(), "consensus of weak masks, stage by stage", "1 (weak steps charged)", "Jaiswal 2023"),
    "isp-no-soup": Row(
        InstantSoup(weak_masks=0), "isp's schedule, plain magnitude", "1", "Jaiswal 2023, ablation", fixed=SOUP
    ),
    "isp-paper": Row(InstantSoupPaper(), "isp as the paper says it", "1 + stages N C / T", "Jaiswal 2023"),
    "isp-code": Row(InstantSoupCode(), "isp as its code does it", "1 + stages N C / T", "its released code"),
}

METHODS: dict[str, Method] = {name: row.method for name, row in TABLE.items()}
