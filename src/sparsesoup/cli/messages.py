"""Error messages in the terms of the user's command."""

import re

DATA = ("text-columns", "image-column", "label-column", "drop-unlabelled", "data-root", "dataset-config", "max-length",
        "doc-stride", "prompts", "class-names")  # flags of prune for reading data  # fmt: skip


def as_settings(command: str, message: str) -> str:
    """Replace flags of `prune` by recipe keys in a message, for a command that reads a recipe and lacks the flag.

    Flags of a method and of training keep their dots and dashes, as in the help of `compare`.

    >>> as_settings("test", "correct `--data-root`"), as_settings("prune", "correct `--data-root`")
    ('correct `data_root`', 'correct `--data-root`')
    """
    own: set[str] = set()
    if command == "compare":
        from sparsesoup.cli.study_flags import study_parser

        own = {*study_parser()._option_string_actions}
    elif command not in ("test", "export"):  # these read the run.yaml of the run
        return message
    flags = re.compile(rf"(?<![\w-])--({'|'.join(DATA)})(?![\w-])")
    return flags.sub(lambda found: found[0] if found[0] in own else found[1].replace("-", "_"), message)
