"""Small files that stand for huge ones: refused at once, in a line, wherever YAML or JSON is read."""

import json
import shutil
import time

import pytest

import sparsesoup.study.compare  # noqa: F401 - which takes seconds, and is no part of what is timed below
from sparsesoup.cli.main import main
from sparsesoup.core.files import from_json
from sparsesoup.runs.yaml_text import LARGEST, MOST, BadYaml, read_yaml
from tiny_hub import run_of


def doubled(levels, ends="[{}]", link="*q{}", first="[l,l,l,l,l,l,l,l,l,l]"):
    """10^levels values in a few hundred bytes."""
    parts = [f"&q0 {first}"]
    parts += [f"&q{i + 1} " + ends.format(",".join([link.format(i)] * 10)) for i in range(levels - 1)]
    return "[" + ",".join(parts) + "]"


BOMBS = {
    "lists": doubled(9),
    "merged": doubled(9, "{{<<: [{}]}}", first="{a: 1}"),
    "lists beyond any memory": doubled(60),
}


@pytest.fixture
def refused(capsys):
    def refuse(*line):
        began = time.monotonic()
        assert main([str(word) for word in line]) == 2
        assert time.monotonic() - began < 10
        (said,) = capsys.readouterr().err.splitlines()
        return said

    return refuse


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_aliases_that_multiply_are_refused_in_recipes_studies_and_flags(refused, tmp_path, bomb):
    recipe, study = tmp_path / "recipe.yaml", tmp_path / "study.yaml"
    recipe.write_text(f"method: magnitude\ntext_columns: {bomb}\n")
    study.write_text(f"methods: [magnitude]\nmodels: bert\ndatasets: {bomb}\n")
    for line in (["prune", "--config", recipe], ["compare", "--config", study, "--out", tmp_path]):
        assert "values with its aliases (*) written out, allowed are 100,000" in refused(*line)
    for flags in (["--text-columns", bomb], ["--train.batch-size", bomb], ["--train", bomb]):
        assert "values with its aliases (*) written out" in refused("prune", "magnitude", *flags)


def test_aliases_that_stand_for_little_are_read():
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}],
    }  # fmt: skip
    assert len(read_yaml(f"[{','.join(['1'] * (MOST // 20))}]")) == MOST // 20
    with pytest.raises(BadYaml, match=r"stands for 12,345,679,011 values"):
        read_yaml(doubled(10))


def test_a_file_without_an_end_is_no_recipe(refused, tmp_path):
    (tmp_path / "long.yaml").write_bytes(b"#" * (LARGEST + 1))
    for path in ("/dev/zero", tmp_path / "long.yaml"):
        assert f"it has more than {LARGEST:,} bytes" in refused("prune", "--config", path)
        assert f"it has more than {LARGEST:,} bytes" in refused("compare", "--config", path)


DEEP = '{"a":' * 3000 + "1" + "}" * 3000


def test_json_nested_too_deep_is_damaged_and_no_traceback(place, refused, tmp_path, capsys):
    line = ["prune", "magnitude", "--model", place / "bert", "--dataset", place / "reviews", "--steps", "4"]
    assert main([*map(str, line), "--sparsity", "0.7", "--train.batch-size", "8", "--out", str(tmp_path / "runs")]) == 0
    run, packed = run_of(tmp_path / "runs"), tmp_path / "packed"
    assert main(["export", str(run), "--to", "packed", "--out", str(packed)]) == 0
    capsys.readouterr()
    for whole, name, command in [
        (run, "report.json", ["show"]),
        (run, "report.json", ["test"]),
        (run, "model/pruning/ticket.json", ["export", "--to", "packed"]),
        (run, "model/config.json", ["push", "me/x", "--dry-run"]),
        (packed, "export.json", ["push", "me/x", "--dry-run"]),
    ]:
        folder = shutil.copytree(whole, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        (folder / name).write_text(DEEP)
        to = [] if command[0] in ("show", "test") else ["--out", tmp_path / "out"]
        said = refused(command[0], folder, *command[1:], *to)
        assert ("is not the file that was written" if name.startswith("model/c") else "nested too deep") in said
        assert not (tmp_path / "out").exists()
    (run / "benchmark.json").write_text(DEEP)
    (run / "report.html").unlink()
    assert main(["test", str(run)]) == 0  # a page without what was measured, rather than none


def test_what_is_no_json_is_said_as_such():
    assert from_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deep"):
        from_json(DEEP)
    with pytest.raises(json.JSONDecodeError):
        from_json("{")
