"""The recipes that are shipped: laid out as published, and rows that begin with the tickets of others."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.runs.config import config_from_dict
from sparsesoup.study.recipe.plan import read_plan
from sparsesoup.study.recipe.yaml_lines import SHIPPED
from sparsesoup.study.results.scores import ScoreTable
from sparsesoup.study.results.tables import latex_table
from tiny_hub import masks_of, reviews
from tiny_studies import study, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inside")]


PUBLISHED = {
    "mnli": 0.7,
    "qqp": 0.9,
    "stsb": 0.5,
    "wnli": 0.9,
    "qnli": 0.7,
    "mrpc": 0.5,
    "rte": 0.6,
    "sst2": 0.6,
    "cola": 0.5,
}
IMAGES = {"stanford_cars": 0.3, "mnist": 0.7, "svhn": 0.7, "gtsrb": 0.5, "cifar10": 0.6, "cifar100": 0.6}
SMALL = {"models": ["bert"], "datasets": ["reviews"], "sparsities": [0.5]}
TRANSFER = {
    "models": "bert", "datasets": ["reviews", "others"], "sparsities": 0.5, "seeds": [0], "steps": 6,
    "train": {"batch_size": 8}, "methods": {"gradual": None, "moved": {"from": "gradual"}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _others(tmp_path):
    for name in ("glue/cola", "glue/mnli_dev_split", "others"):
        reviews(tmp_path / name, 60)


def published(name):
    return yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())


def test_table_3_has_the_published_sparsity_of_each_task():
    found = {name.removeprefix("glue/"): own["sparsities"] for name, own in published("table3")["datasets"].items()}
    assert found == PUBLISHED


def test_table_2_has_three_published_sparsities_of_each_set():
    found = {name.split("/")[1]: own["sparsities"] for name, own in published("table2")["datasets"].items()}
    assert {name: values[0] for name, values in found.items()} == IMAGES
    assert all(values == pytest.approx([values[0] + k / 10 for k in range(3)]) for values in found.values())


@pytest.mark.parametrize(("name", "rows"), [("table2", 12), ("table3", 9), ("transfer", 6)])
def test_a_shipped_recipe_is_found_by_its_name_and_all_its_rows_are_sound(name, rows):
    plan = read_plan(Path(name), SMALL)
    assert plan.name == name
    assert len({cell.row for cell in plan.trials}) == rows
    assert len(plan.trials) == 3 * rows


def test_a_copy_of_a_dataset_keeps_the_sparsity_published_for_it_and_a_flag_wins():
    datasets = ["glue/mnli_dev_split", "glue/cola"]
    cells = read_plan(Path("table3"), {"models": ["bert"], "datasets": datasets}).trials
    assert {cell.column_of[1:] for cell in cells if cell.sparsity} == {(datasets[0], 0.7), (datasets[1], 0.5)}
    changes = {"models": ["bert"], "datasets": datasets, "sparsities": [0.3], "seeds": [4], "steps": 9}
    found = [c for c in read_plan(Path("table3"), changes).trials if c.sparsity]
    assert {(c.sparsity, c.seed, c.settings.budget.steps, c.settings.budget.epochs) for c in found} == {
        (0.3, 4, 9, None)
    }


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("stanford_cars_crop96", "tanganke/stanford_cars"),
        ("cifar10_jpeg", "uoft-cs/cifar10"),
        ("cifar100-small", "uoft-cs/cifar100"),
        ("data/MNIST", "ylecun/mnist"),
        ("mnist.csv", "ylecun/mnist"),
        ("stanford_dogs", None),
        ("stanford", None),
        ("mnist2", None),
        ("cifar", None),
    ],
)
def test_a_dataset_has_the_settings_of_one_only_if_it_is_called_by_its_whole_name(name, known, place):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).symlink_to(place / ("reviews/train.csv" if name.endswith("csv") else "reviews"))
    plan = read_plan(Path("table2"), {"models": ["bert"], "datasets": [name], "seeds": [0]})
    own = published("table2")["datasets"][known]["sparsities"] if known else [0.9]
    assert list(dict.fromkeys(cell.sparsity for cell in plan.trials if cell.sparsity)) == own


def test_of_two_names_that_a_copy_begins_with_the_longer_one_is_meant(place):
    Path("mnist_small_jpeg").symlink_to(place / "reviews")
    recipe = TRANSFER | {"datasets": {"a/mnist": {"sparsities": 0.6}, "b/mnist_small": {"sparsities": 0.7}}}
    write_recipe(recipe, "moves")
    cells = read_plan(Path("moves.yaml"), {"datasets": ["mnist_small_jpeg"]}).trials
    assert {cell.sparsity for cell in cells} == {0.7}


def test_a_recipe_that_is_nowhere_is_told_with_those_that_are_shipped(capsys):
    assert main(["compare", "--config", "table9"]) == 2
    assert "shipped ones are table2, table3, transfer" in capsys.readouterr().err


def test_latex_heads_sparsities_by_their_dataset_and_parts_what_is_not_pruned():
    columns = [("m", "mnist", 0.7), ("m", "mnist", 0.8), ("m", "cars_96", 0.3)]
    scores = {(row, column): {0: 0.5, 1: 0.6} for row in ("Full", "ISP") for column in columns}
    lines = latex_table(
        ScoreTable(["Full", "ISP"], columns, scores, seeds=2, unpruned=frozenset({"Full"}))
    ).splitlines()
    assert lines[2] == r" & \multicolumn{2}{c}{mnist} & \multicolumn{1}{c}{cars\_96} &  &  \\"
    assert lines[3] == r"method & 70 \% & 80 \% & 30 \% & mean & FLOPs (dense = 1) \\"
    assert lines[6] == r"\midrule"


def test_a_ticket_of_one_task_is_trained_on_every_other_and_the_folder_of_runs_may_be_moved(tmp_path, capsys):
    write_recipe(TRANSFER, "moves")
    assert main(["compare", "--config", "moves.yaml", "--workers", "2", "--threads", "1"]) == 0
    found = study("moves")
    assert not found["failed"]
    runs = {(each["row"], each["dataset"]): Path("runs", each["run"]) for each in found["runs"]}
    assert len(runs) == 2 + 4
    tickets = {origin: masks_of(runs["gradual", origin]) for origin in ("reviews", "others")}
    for origin, ticket in tickets.items():
        for target in ("reviews", "others"):
            there = masks_of(runs[f"moved {origin}", target])
            assert all(there[name].equal(mask) for name, mask in ticket.items())
    assert any(not tickets["others"][name].equal(mask) for name, mask in tickets["reviews"].items())
    here, there = (read_plan(Path("moves.yaml"), out=out).trials for out in (Path("runs"), tmp_path / "moved" / "runs"))
    assert [cell.trial_key for cell in here] == [cell.trial_key for cell in there]
    assert [cell.path for cell in here] == [cell.path for cell in there]
    before = Path("runs/studies/moves/study.md").read_text()
    Path("runs").rename("elsewhere")
    capsys.readouterr()
    assert main(["compare", "--config", "moves.yaml", "--out", str(Path("elsewhere").resolve())]) == 0
    assert "training" not in capsys.readouterr().err
    assert Path("elsewhere/studies/moves/study.md").read_text() == before


@pytest.mark.parametrize(
    ("own", "line", "said"),
    [
        ({"from": "isp"}, "from:", "row moved begins with the ticket of isp on reviews at sparsity 0.5, seed 0, which"),
        ({"from": {"row": "magnitude", "dataset": "nowhere"}}, "dataset:", "allowed: reviews, others"),
        ({"from": {"rows": "magnitude"}}, "rows:", "rows: unknown setting (allowed: row, dataset); did you mean row?"),
        ({"from": "magnitude", "name": "isp"}, "name:", "its method is ticket; leave out name"),
        ({"from": "blocks"}, "from:", "whose masks are in groups"),
        ({"from": None}, "from:", "row moved: from is the name of a row, or {row: NAME, dataset: NAME}, got None"),
        ({"from": ["magnitude"]}, "from:", "from is the name of a row, or {row: NAME, dataset: NAME}, got ['magn"),
        ({"from": {"dataset": "others"}}, "from:", "from is the name of a row, or {row: NAME, dataset: NAME}, got {'d"),
        ({"from": "magnitude", "seeds": [3]}, "from:", "seed 3, which this study does not make"),
    ],
)  # fmt: skip
def test_a_row_without_a_ticket_to_begin_with_is_refused_with_its_line(own, line, said, capsys):
    pattern = {"name": "block-movement", "method": {"pattern": {"rows": 1, "cols": 0}}}
    methods = {"magnitude": None, "blocks": pattern, "moved": own}
    write_recipe(TRANSFER | {"methods": methods}, "moves")
    assert main(["compare", "--config", "moves.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert said in error
    named = int(error.split("line ")[1].split(":")[0])
    assert Path("moves.yaml").read_text().splitlines()[named - 1].strip().startswith(line)


def test_settings_of_a_row_or_a_dataset_that_are_no_table_are_refused_in_one_line(capsys):
    for changes, said in (
        ({"methods": {"isp": 3}}, "row isp has its own settings"),
        ({"datasets": {"reviews": 3}}, "reviews has"),
    ):
        write_recipe(TRANSFER | changes, "moves")
        assert main(["compare", "--config", "moves.yaml"]) == 2
        assert said in capsys.readouterr().err


def test_a_row_may_begin_with_the_tickets_of_one_dataset_alone():
    methods = {
        "gradual": None,
        "one": {"from": {"row": "gradual", "dataset": "others"}},
        "all": {"from": {"row": "gradual"}},
    }
    write_recipe(TRANSFER | {"methods": methods}, "moves")
    plan = read_plan(Path("moves.yaml"), out=Path("there"))
    assert list(dict.fromkeys(cell.row for cell in plan.trials)) == ["gradual", "one", "all reviews", "all others"]
    drawn = {cell.column_of[1]: cell.path for cell in plan.trials if cell.row == "gradual"}
    for cell in plan.trials[2:]:
        origin = "others" if cell.row == "one" else cell.row.removeprefix("all ")
        assert cell.needs == drawn[origin]
        assert cell.settings.method.ticket == str(Path("there") / drawn[origin])


def test_settings_from_python_may_be_paths():
    table = {"model": Path("my/bert"), "train": {"distill": {"teacher": Path("runs/x")}}}
    found = config_from_dict("ticket", table | {"method": {"ticket": Path("runs/y")}})
    assert (found.model_data.model, found.train.distill.teacher, found.method.ticket) == ("my/bert", "runs/x", "runs/y")


def test_settings_from_python_may_be_numbers_of_numpy():
    table = {"sparsity": np.float32(0.75), "steps": np.int64(40), "seed": np.arange(3)[2]}
    table["method"] = {"every": np.float16(0.5)}
    plain = {"sparsity": 0.75, "steps": 40, "seed": 2, "method": {"every": 0.5}}
    assert config_from_dict("gradual", table) == config_from_dict("gradual", plain)


def test_class_names_may_be_a_list_and_no_other_text_may():
    assert (
        config_from_dict("random", {"class_names": ["dark", "light red", 3]}).model_data.class_names
        == "dark,light red,3"
    )
    wrong = {"prompts": ["a {}.", "my {}."], "class_names": ["a, b", "c"], "class-names": [True, "c"], "model": ["b"]}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"^{name.replace('-', '_')}: expected text, got "):
            config_from_dict("random", {name: value})


def test_a_list_of_prompts_in_a_study_is_refused_with_its_line():
    recipe = {**SMALL, "methods": ["random"], "datasets": {"reviews": {"prompts": ["a {}.", "my {}."]}}}
    write_recipe(recipe, "listed")
    with pytest.raises(UserError, match=r"^listed.yaml, line 5: prompts: expected text, got .*one a line"):
        read_plan(Path("listed.yaml"))


def test_the_configuration_of_a_published_dataset_is_none_of_a_copy():
    recipe = {**SMALL, "methods": ["random"], "datasets": {"my/others": {"dataset_config": "plain", "steps": 7}}}
    write_recipe(recipe, "own")
    (cell,) = read_plan(Path("own.yaml"), {"datasets": ["others"], "seeds": [0]}).trials
    assert (cell.settings.model_data.dataset_config, cell.settings.budget.steps) == (None, 7)
    with pytest.raises(UserError, match="has no subfolder 'plain'"):
        read_plan(Path("own.yaml"), {"datasets": ["others"], "dataset_config": "plain"})
