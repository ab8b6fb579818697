"""GLUE tasks by name: their text columns and metrics."""

import re

GLUE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("matthews",)),
    "sst2": (("sentence",), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1")),
    "qqp": (("question1", "question2"), ("accuracy", "f1")),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman")),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), ("accuracy",)),
}


def glue_task(name: str) -> str | None:
    """Return the GLUE task at the end of a dataset's name, if any.

    >>> glue_task("nyu-mll/glue:rte"), glue_task("glue/qnli_dev_split"), glue_task("data/colander")
    ('rte', 'qnli', None)
    """
    found = re.search(rf"(?:^|[/\\])glue[/\\:]({'|'.join(GLUE)})(?:_[^/\\:]*)?/?$", name)
    return found.group(1) if found else None
