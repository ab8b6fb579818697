"""sparsesoup: lottery-ticket-quality sparse subnetworks of pre-trained transformers.

>>> from sparsesoup import prune
>>> run = prune("isp", model="minilm", dataset="docstrings", sparsity=0.9, steps=200)  # doctest: +SKIP
>>> run.report["validation"], run.path / "model"  # doctest: +SKIP

What is named here is public. A change that breaks it is announced in CHANGELOG.md; all else may change at any time.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsesoup.api import apply as apply
    from sparsesoup.api import benchmark as benchmark
    from sparsesoup.api import compare as compare
    from sparsesoup.api import evaluate_on_test as evaluate_on_test
    from sparsesoup.api import export as export
    from sparsesoup.api import prune as prune
    from sparsesoup.api import push as push
    from sparsesoup.core.errors import UserError as UserError
    from sparsesoup.core.ticket import Ticket as Ticket
    from sparsesoup.core.ticket import load_masks as load_masks
    from sparsesoup.exports import load_compact as load_compact
    from sparsesoup.exports import load_low_rank as load_low_rank
    from sparsesoup.exports import load_packed as load_packed
    from sparsesoup.exports import load_semi_structured as load_semi_structured
    from sparsesoup.hub.models.open_clip import from_open_clip as from_open_clip
    from sparsesoup.hub.models.tickets import SparsityCallback as SparsityCallback
    from sparsesoup.loops.attach import attach as attach
    from sparsesoup.loops.callback import PruningCallback as PruningCallback
    from sparsesoup.loops.objects import PrunedModel as PrunedModel
    from sparsesoup.loops.objects import prune_model as prune_model
    from sparsesoup.loops.objects import prune_trainer as prune_trainer
    from sparsesoup.loops.once import prune_once as prune_once
    from sparsesoup.loops.pruner import Pruner as Pruner
    from sparsesoup.methods import METHODS as METHODS
    from sparsesoup.methods import DenseFinetuning as DenseFinetuning
    from sparsesoup.methods import EarlyBird as EarlyBird
    from sparsesoup.methods import FromTicket as FromTicket
    from sparsesoup.methods import GradientFlow as GradientFlow
    from sparsesoup.methods import GradualOBS as GradualOBS
    from sparsesoup.methods import GradualPruning as GradualPruning
    from sparsesoup.methods import GradualStar as GradualStar
    from sparsesoup.methods import Grain as Grain
    from sparsesoup.methods import Grasp as Grasp
    from sparsesoup.methods import HardConcreteL0 as HardConcreteL0
    from sparsesoup.methods import HybridMovement as HybridMovement
    from sparsesoup.methods import InstantModelSoup as InstantModelSoup
    from sparsesoup.methods import InstantSoup as InstantSoup
    from sparsesoup.methods import InstantSoupCode as InstantSoupCode
    from sparsesoup.methods import InstantSoupPaper as InstantSoupPaper
    from sparsesoup.methods import IterativeMagnitudePruning as IterativeMagnitudePruning
    from sparsesoup.methods import LotteryPools as LotteryPools
    from sparsesoup.methods import MagnitudeStraightThrough as MagnitudeStraightThrough
    from sparsesoup.methods import Method as Method
    from sparsesoup.methods import MethodInfo as MethodInfo
    from sparsesoup.methods import MlPruning as MlPruning
    from sparsesoup.methods import ModelSoup as ModelSoup
    from sparsesoup.methods import MovementPruning as MovementPruning
    from sparsesoup.methods import OneShot as OneShot
    from sparsesoup.methods import Pela as Pela
    from sparsesoup.methods import Pins as Pins
    from sparsesoup.methods import Platon as Platon
    from sparsesoup.methods import PowerPropagation as PowerPropagation
    from sparsesoup.methods import Snip as Snip
    from sparsesoup.methods import SoftMovement as SoftMovement
    from sparsesoup.methods import SparseGpt as SparseGpt
    from sparsesoup.methods import SparseModelSoup as SparseModelSoup
    from sparsesoup.methods import SparseProgressiveDistillation as SparseProgressiveDistillation
    from sparsesoup.methods import Wanda as Wanda
    from sparsesoup.runs.run import Run as Run
    from sparsesoup.training.config import DistillConfig as DistillConfig
    from sparsesoup.training.config import TrainingConfig as TrainingConfig
    from sparsesoup.training.config import TrainingOverrides as TrainingOverrides
    from sparsesoup.training.observer import Observer as Observer
    from sparsesoup.training.plan import Phase as Phase
    from sparsesoup.training.problem import Problem as Problem
    from sparsesoup.training.size import RunSize as RunSize
    from sparsesoup.training.zero_hooks import hold_zeros as hold_zeros

# Name -> module, looked up when a name is first used: transformers takes a second to import.
_NAMES = {
    "sparsesoup.api": "apply benchmark compare evaluate_on_test export prune push",
    "sparsesoup.core.errors": "UserError",
    "sparsesoup.core.ticket": "Ticket load_masks",
    "sparsesoup.exports": "load_compact load_low_rank load_packed load_semi_structured",
    "sparsesoup.hub.models.tickets": "SparsityCallback",
    "sparsesoup.hub.models.open_clip": "from_open_clip",
    "sparsesoup.loops.attach": "attach",
    "sparsesoup.loops.callback": "PruningCallback",
    "sparsesoup.loops.objects": "PrunedModel prune_model prune_trainer",
    "sparsesoup.loops.once": "prune_once",
    "sparsesoup.loops.pruner": "Pruner",
    "sparsesoup.methods": "METHODS DenseFinetuning EarlyBird FromTicket GradientFlow GradualOBS GradualPruning "
    "GradualStar Grain Grasp HardConcreteL0 HybridMovement InstantModelSoup InstantSoup InstantSoupCode "
    "InstantSoupPaper IterativeMagnitudePruning LotteryPools MagnitudeStraightThrough Method MethodInfo MlPruning "
    "ModelSoup MovementPruning OneShot Pela Pins Platon PowerPropagation Snip SoftMovement SparseGpt "
    "SparseModelSoup SparseProgressiveDistillation Wanda",
    "sparsesoup.runs.run": "Run",
    "sparsesoup.training.config": "DistillConfig TrainingConfig TrainingOverrides",
    "sparsesoup.training.observer": "Observer",
    "sparsesoup.training.plan": "Phase",
    "sparsesoup.training.problem": "Problem",
    "sparsesoup.training.size": "RunSize",
    "sparsesoup.training.zero_hooks": "hold_zeros",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_HOME, "__version__"]

try:
    __version__ = version("sparsesoup")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsesoup' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()} - {"Any", "TYPE_CHECKING", "import_module", "version", "PackageNotFoundError"})
