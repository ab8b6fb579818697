"""`sparsesoup compare`: flags, parsed and checked without slow imports, and the study that they ask for."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from sparsesoup.cli.command import Command, CommandParser, flag_value
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import read_table
from sparsesoup.core.process_pool import MAX_ATTEMPTS
from sparsesoup.core.threads import check_threads
from sparsesoup.report.escaping import SafeConsole, print_line
from sparsesoup.study.execute.ray_connect import check_ray_reachable, ray_address

ABOUT = """Run models, datasets, methods, sparsities and seeds as one resumable study, with a table and a page.

A recipe is YAML:

  models: minilm                 # one or a list, as for datasets, sparsities and seeds
  datasets: [glue/cola, glue/sst2]
  sparsities: [0.5, 0.9]
  seeds: [0, 1, 2]
  steps: 1440                    # T of every run; or epochs
  train: {precision: bf16}       # as --train.FIELD of prune
  methods:                       # rows of the table: a list of names, or a table with settings
    dense:
    isp:
    slow-imp: {name: imp, method: {cut: 0.1}}
    dense-2T: {name: dense, times: 2}
    moved: {from: isp}           # isp's tickets of each dataset, trained on the others
  budget: paper                  # or equal: all rows get the FLOPs of dense; {times: 3}, {row: imp}, {flops: 2e15}

Shipped recipes: table2 (CLIP on images), table3 (BERT on GLUE), transfer.

Repeat the command to resume after a kill. The test split is scored once per run, when the run is complete. Runs are
trained in this process, in several (--workers 2), or on Ray (--executor ray), here or on the nodes of a cluster that
share the working directory and --out: bit-identical on CPUs for the same number of threads. The exit code is 1 if
runs failed.
"""
IN_PLACE = "in place of what the recipe of --config has"
LISTS: dict[str, tuple[str, Callable[[str], Any]]] = {  # key of a recipe -> the flag of `prune`, type
    "models": ("model", str), "datasets": ("dataset", str), "sparsities": ("sparsity", float), "seeds": ("seed", int),
}  # fmt: skip
OF_DATA = {  # key of a recipe, and flag of `prune` -> meaning
    "dataset_config": "configuration of Hub datasets", "text_columns": "the one or two columns of texts",
    "image_column": "the column of images", "label_column": "the column to predict",
    "drop_unlabelled": "drop rows without a label", "prompts": "prompts for the classes of images, for CLIP",
    "class_names": "class names in prompts",
}  # fmt: skip
CHANGES = (*LISTS, "steps", "epochs", "data_root", *OF_DATA)


def study_parser() -> CommandParser:
    """Return the parser of `compare`."""
    made = CommandParser("compare", ABOUT)
    add = made.add_argument
    add("RUN", type=Path, nargs="*", help="existing runs, for a table without a recipe")
    add("--config", help="recipe (YAML), or the name of a shipped one: table2, table3, transfer")
    add("--out", type=Path, default=Path("runs"), help="folder of all runs, with studies in studies/")
    add("--name", help="name of the study; default: the recipe's file name, `runs` for existing runs")
    _add_changes(made)
    add("--data-root", help="folder of named datasets; default the variable SPARSESOUP_DATA")
    add("--executor", choices=("local", "ray"), default="local", help="run on this machine (default), or on Ray")
    add("--workers", type=int, help="parallel runs; default 1, in this process; on Ray as many as fit")
    add("--threads", type=int, help="torch threads per run; default: the cores divided by --workers, on Ray "
        "--cpus-per-run")  # fmt: skip
    add("--retries", type=int, help=f"restarts of a run whose process died; default {MAX_ATTEMPTS - 1}")
    add("--address", help="host:port of a Ray cluster's head, or auto; default RAY_ADDRESS, else Ray is started here")
    add("--cache-size", type=float, default=32.0, metavar="GIB", help="most GiB of trainings that runs share; those "
        "used least recently are removed (default 32)")  # fmt: skip
    add("--snapshots", default="device", metavar="WHERE", help="keep forks and rewinding points on the device, in host "
        "memory (host) or on disk (disk); default device")  # fmt: skip
    add("--workers-per-run", type=int, default=1, help="processes for the weak masks of a run; default 1")
    add("--cpus-per-run", type=float, help="cores that Ray reserves per run; default 1")
    add("--gpus-per-run", type=float, help="GPUs that Ray reserves per run, 0.25 for four runs on one; default 0")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:<number> or mps, for runs on this machine (default the "
        "first accelerator, else cpu)")  # fmt: skip
    add("--retry-failed", action="store_true", help="retry runs that failed before")
    add("--dry-run", action="store_true", help="print the runs and their estimated cost without training")
    return made


def _add_changes(made: CommandParser) -> None:
    """Add the flags that take the place of keys of a recipe."""
    add = made.add_argument_group(IN_PLACE).add_argument
    for key, (one, kind) in LISTS.items():
        add(f"--{key}", f"--{one}", nargs="+", type=kind, metavar=one.upper(), help=f"one or more {key}")
    add("--steps", type=int, help="T, the steps of one fine-tuning")
    add("--epochs", type=float, help="T in epochs")
    add("--drop-unlabelled", nargs="?", const=True, metavar="{true,false}", help=OF_DATA["drop_unlabelled"],
        type=lambda text: flag_value(bool, text, "drop_unlabelled"))  # fmt: skip
    for key, meaning in OF_DATA.items():
        if key != "drop_unlabelled":
            add(f"--{key.replace('_', '-')}", nargs="+" if key == "text_columns" else None, help=meaning)


def read_study_arguments(arguments: Sequence[str]) -> Any:
    """Parse the flags. A cluster that is to run the trials must respond before their cost is estimated.

    Raises: UserError if flags conflict, or the cluster does not respond.
    """
    options = study_parser().parse_args(arguments)
    if bool(options.RUN) == bool(options.config):
        raise UserError("compare needs either --config recipe.yaml or runs that exist; see `sparsesoup compare --help`")
    if options.RUN:
        _need_no_recipe(options)
        return options
    ray = options.executor == "ray"
    _need_fitting(options, ray)
    if options.device:
        from sparsesoup.training.device import choose_device  # which loads torch

        choose_device(options.device)
    if ray and not options.dry_run:
        check_ray_reachable(ray_address(options.address))
    return options


def _need_fitting(options: Any, ray: bool) -> None:
    """Raise a UserError for an invalid number, or a flag without effect."""
    for flag, low in (("workers", 1), ("threads", 1), ("retries", 0), ("workers_per_run", 1)):
        if (value := getattr(options, flag)) is not None and value < low:
            raise UserError(f"--{flag.replace('_', '-')} is at least {low}, got {value}")
    if not ray or ray_address(options.address) == "local":  # the nodes of a cluster have other numbers of cores
        check_threads(options.threads)
    for flag in ("address", "cpus_per_run", "gpus_per_run"):
        if getattr(options, flag) is not None and not ray:
            raise UserError(f"--{flag.replace('_', '-')} is for runs on Ray; add --executor ray")
    if ray and options.device:
        raise UserError("--device is for runs on this machine; Ray gives each run its own by --gpus-per-run")
    if options.retries is not None and not ray and (options.workers or 1) == 1:
        raise UserError("--retries is for runs in processes of their own; add --workers 2 or --executor ray")


def _need_no_recipe(options: Any) -> None:
    """Raise a UserError for a flag without effect on existing runs."""
    plain = vars(study_parser().parse_args([]))
    given = [name for name, value in vars(options).items() if value != plain[name]]
    for name in given:
        if name not in ("RUN", "out", "name"):
            raise UserError(f"--{name.replace('_', '-')} is for a recipe; with runs that exist, leave it out")


def recipe_changes(options: Any) -> dict[str, Any]:
    """Return key of the recipe -> its value, or None, by the flags."""
    found = {key: getattr(options, key) for key in CHANGES}
    if found["steps"] is not None and found["epochs"] is not None:
        raise UserError("--steps and --epochs are mutually exclusive; give one of them")
    return found


def run_study_command(options: Any) -> int:
    """Run `sparsesoup compare`; return 1 if trials of the study have failed, also in an earlier command, else 0.

    Args:
        options: as returned by `read_study_arguments`.
    """
    from sparsesoup.runs.memory import may_take_snapshots
    from sparsesoup.runs.options import RuntimeOptions, check_cache_size
    from sparsesoup.runs.run import masks_of
    from sparsesoup.study.compare import check_devices, run_study, table_of_runs  # which takes seconds
    from sparsesoup.study.dry_run import forecast_trials, format_forecast
    from sparsesoup.study.equal_budget import match_budget
    from sparsesoup.study.execute.jobs import TrialOptions
    from sparsesoup.study.recipe.plan import read_plan

    console = SafeConsole(stderr=True)
    if options.RUN:
        _print_tables(table_of_runs(options.RUN, options.name or "runs", options.out))
        return 0
    own = {"workers": options.workers_per_run, "cache_size": options.cache_size, "snapshots": options.snapshots}
    RuntimeOptions(console, workers=options.workers_per_run, snapshots=options.snapshots)  # checks them first
    check_cache_size(options.cache_size)
    how = TrialOptions(threads=options.threads, **own)
    fit = not options.dry_run  # a dry run reports every row that does not fit
    plan = match_budget(read_plan(Path(options.config), recipe_changes(options), options.name, options.out, fit))
    if options.workers_per_run > 1 and not any(masks_of(trial.settings) for trial in plan.trials):
        raise UserError("no row of the study has weak masks, for which it is; leave it out", "workers_per_run")
    notes = {trial.settings.train.precision_warning() for trial in plan.trials}
    if options.snapshots != "device" and not any(may_take_snapshots(trial.settings) for trial in plan.trials):
        notes.add(f"--snapshots {options.snapshots} has no effect: no row of the study takes snapshots")
    for note in sorted(notes - {""}):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if options.dry_run:
        trials = forecast_trials(plan, options.out, options.snapshots)
        found = track(trials, "estimating", len(plan.trials), console=console, transient=True)
        for line in format_forecast(found, options.out, options.workers or 1, options.cache_size):
            print_line(line)
        return 0
    if options.executor == "local":  # the nodes of a cluster have devices of their own
        check_devices(plan)
    with _make_executor(options) as executor:
        folder = run_study(plan, options.out, console, executor, how, options.retry_failed)
    _print_tables(folder)
    return int(bool(read_table(folder / "study.json")["failed"]))


@contextlib.contextmanager
def _make_executor(options: Any) -> Iterator[Any]:
    """Provide the executor chosen by the flags."""
    from sparsesoup.study.execute.executors import local_executor
    from sparsesoup.study.execute.ray_executor import TrialResources, ray_executor

    attempts = MAX_ATTEMPTS if options.retries is None else options.retries + 1
    if options.executor == "local":
        yield local_executor(options.workers or 1, attempts)
        return
    given = {"cpus": options.cpus_per_run, "gpus": options.gpus_per_run}
    room = TrialResources(**{name: value for name, value in given.items() if value is not None})
    with ray_executor(options.address, options.out, room, options.workers, attempts) as made:
        yield made


def _print_tables(folder: Path) -> None:
    for line in (folder / "study.md").read_text(encoding="utf-8").split("\n"):
        print_line(line)
    print_line(f"page    {folder / 'study.html'}")
    print_line(f"tables  {folder / 'study.md'}, .tex, .csv, .parquet, .json")


COMMANDS = {"compare": Command(parser=study_parser, run=run_study_command, parse=read_study_arguments)}
