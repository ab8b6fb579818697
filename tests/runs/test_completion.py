"""Completion scripts come from the command line itself, and bash completes by them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sparsesoup.cli.completion import SHELLS
from sparsesoup.cli.main import COMMANDS, main
from sparsesoup.methods import METHODS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the script of each shell, as a user writes it to a file."""
    folder, found = tmp_path_factory.mktemp("scripts"), {}
    for shell in SHELLS:
        found[shell] = folder / shell
        with pytest.MonkeyPatch.context() as patch, open(found[shell], "w", encoding="utf-8") as file:
            patch.setattr("sys.stdout", file)
            assert main(["completion", shell]) == 0
    return found


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("pr", "prune"),
        ("prune gr", "grasp gradual gradual-obs grain gradient-flow"),
        ("prune isp --method.weak", "--method.weak-masks"),
        ("prune gradual --method.weak", ""),
        ("prune --conf", "--config"),
        ("prune isp --train.optimizer ad", "adamw adam adafactor adamw_bnb_8bit"),
        ("export run --to co", "compact"),
        ("methods plat", "platon"),
        ("completion f", "fish"),
    ],
)
def test_bash_completes(scripts, words, found, tmp_path):
    given = ["sparsesoup", *words.split(" ")]
    code = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _shtab_sparsesoup; echo "${COMPREPLY[*]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", str(scripts["bash"]), *given],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == found.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_name_every_command_and_method_and_are_read_by_their_shell(scripts, shell):
    text = scripts[shell].read_text(encoding="utf-8")
    assert all(name in text for name in (*COMMANDS, *METHODS, "weak-masks"))
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(scripts[shell])], check=True)


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "cmd"]) == 2
    assert "bash" in capsys.readouterr().err
