"""Last lines of a run in the terminal: what its score is worth, and where it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.low_rank import low_rank_of
from sparsesoup.report.format import format_percent
from sparsesoup.report.terminal import is_dense, read_report
from sparsesoup.runs.config import config_from_dict
from sparsesoup.runs.run import fill_default_sparsity, run_folder
from sparsesoup.runs.teacher import dense_config


def closing_lines(path: Path, report: Mapping[str, Any], out: Path) -> list[str]:
    """Return the score of a finished run, those of guessing and of the dense run, and the run directory.

    Args:
        out: folder of all runs, in which the dense run of the same settings may be.
    """
    weights, guess, dense = report["sparsity"], describe_guessing(report["answers"]), find_dense_run(report, out)
    kept = f"{weights['kept']:,} of {weights['total']:,} weights kept, {format_percent(weights['reached'])} pruned"
    if low := low_rank_of(report):
        left = f"{low['left']:,} of {low['weights']:,} weights left by rank (compression {low['compression']:g})"
        kept = f"{left}, {format_percent(low['removed'])} removed"
    return [
        f"{report['method']}: {kept}, validation {format_scores(report['validation'])}",
        *([f"guess   {guess}"] if guess else []),
        *([f"dense   validation {format_scores(dense[1]['validation'])}, in {dense[0]}"] if dense else []),
        f"report  {path / 'report.html'}",
        f"model   {path / 'model'}",
    ]


def describe_guessing(answers: Mapping[str, Any]) -> str:
    """Compare the predictions on the validation rows with a constant prediction.

    >>> describe_guessing({"rows": 200, "right": 0.853, "commonest": 0.52, "labels": 2})
    'right for 85.3 % of 200 validation rows; always the commonest class, for 52.0 %'
    """
    if "explained" in answers:
        share = format_percent(max(answers["explained"], 0.0))
        return f"explains {share} of the variance of {answers['rows']:,} validation labels; always their mean, 0 %"
    if "commonest" not in answers:
        return ""
    same = "class" if "called" in answers or answers["labels"] < answers["rows"] else "place"
    right, common = format_percent(answers["right"]), format_percent(answers["commonest"])
    return f"right for {right} of {answers['rows']:,} validation rows; always the commonest {same}, for {common}"


def find_dense_run(report: Mapping[str, Any], out: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return (path, report) of the finished dense run with the same settings, if it is in the folder of all runs."""
    method = dict(report["settings"]["method"])
    settings = config_from_dict(str(method.pop("name")), {**report["settings"], "method": method})
    path = out / run_folder(report["dataset"], fill_default_sparsity(dense_config(settings)))
    if is_dense(report) or not (path / "report.json").exists():
        return None
    try:
        return path, read_report(path)
    except UserError:  # damaged, which is no matter of this run
        return None


def format_scores(scores: Mapping[str, float]) -> str:
    """Format scores for a line.

    >>> format_scores({"accuracy": 0.5, "macro_f1": 0.25})
    'accuracy 0.5000, macro_f1 0.2500'
    """
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
