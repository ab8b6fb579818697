"""Models of timm and open_clip, whose attention has one matrix for query, key and value."""

import importlib
import json
import sys
import types

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from conftest import same
from sparsesoup import from_open_clip
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import cpu_generator
from sparsesoup.exports.benchmark.candidate import open_candidate
from sparsesoup.hub.models.dummy_inputs import dummy_inputs
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.training.cost import CountFlops
from tiny_hub import masks_of, run_of, weights_of
from tiny_images import PATCH, SIDE, WIDTH, photos

pytestmark = pytest.mark.integration

TABLE = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": SIDE, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": PATCH, "mlp_ratio": 2.0
    },
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 8, "heads": 1, "layers": 1},
}  # fmt: skip
MATRICES = {"attn.in_proj_weight": "query-key-value", "attn.out_proj.weight": "output",
            "mlp.c_fc.weight": "feed-forward in", "mlp.c_proj.weight": "feed-forward out"}  # fmt: skip
METHODS = {"magnitude": [], "movement": [],
           "isp": ["--method.stages", "2", "--method.weak-masks", "2", "--method.look-ahead", "0.1"]}  # fmt: skip


class Block(nn.Module):
    """A block as open_clip has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        parts = {"c_fc": nn.Linear(width, 2 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(2 * width, width)}
        self.mlp = nn.Sequential()
        for name, part in parts.items():
            self.mlp.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """A vision tower of open_clip's names and shapes."""

    def __init__(self, width: int, table: dict) -> None:
        super().__init__()
        inside = table["width"]
        self.conv1 = nn.Conv2d(3, inside, table["patch_size"], table["patch_size"], bias=False)
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, inside))
        self.transformer = nn.Module()
        blocks = [Block(inside, inside // table["head_width"]) for _ in range(table["layers"])]
        self.transformer.resblocks = nn.ModuleList(blocks)
        self.proj = nn.Parameter(torch.randn(inside, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(2).mT + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x)
        return x.mean(1) @ self.proj


class StandIn(nn.Module):
    """What the adapter takes of open_clip, where the library itself is not there."""

    def __init__(self, width: int, vision: dict, text: dict, quick_gelu: bool = False) -> None:
        super().__init__()
        self.visual = Tower(width, vision)

    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


def library(name):
    """A library, or None where it is not there or torchvision is made for another torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and an open_clip checkpoint, its library or a stand-in for it; no test writes to it."""
    folder = tmp_path_factory.mktemp("adapters")
    photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        if not library("open_clip"):
            patch.setitem(sys.modules, "open_clip", types.SimpleNamespace(CLIP=StandIn))
        source(folder / "source")
        from_open_clip(folder / "source", folder / "model")
        yield folder


def source(folder, **preprocess):
    """A checkpoint as open_clip writes it; the model."""
    folder.mkdir()
    torch.manual_seed(0)
    clip = sys.modules["open_clip"].CLIP(*TABLE.values()).eval()
    save_file({name: t.contiguous() for name, t in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    table = {"model_cfg": TABLE, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "size": SIDE, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(table))
    return clip


def line_of(place, model, out, method="magnitude"):
    return ["prune", method, "--model", str(model), "--dataset", str(place / "photos"), "--sparsity", "0.6", "--steps",
            "20", "--train.batch-size", "8", "--train.learning-rate", "0.01", *METHODS[method],
            "--out", str(out)]  # fmt: skip


def load(folder):
    return transformers.AutoModelForImageClassification.from_pretrained(folder).eval()


def test_the_matrix_of_query_key_and_value_is_prunable_though_no_linear_module_owns_it(place):
    model = load(place / "model")
    wanted = {f"visual.transformer.resblocks.{i}.{name}": role for i in range(2) for name, role in MATRICES.items()}
    assert {name: target.role for name, target in find_prunable(model).items()} == wanted
    # No head lies in the folder: a run draws it from its seed.
    assert all(name.startswith("visual.") for name in weights_of(place / "model"))


def test_the_adapter_answers_as_open_clip_does_and_is_counted_like_a_pass_with_gradients(place):
    model, pixels = load(place / "model"), torch.randn(3, 3, SIDE, SIDE, generator=cpu_generator(0))
    torch.manual_seed(0)
    clip = sys.modules["open_clip"].CLIP(*TABLE.values()).eval()
    with torch.no_grad(), CountFlops() as whole:  # in one piece, as nn.MultiheadAttention does without gradients
        features = model.visual(pixels)
        assert features.equal(clip.encode_image(pixels))
    with CountFlops() as parts:
        model.visual(pixels)
    assert whole.flops == 2 * parts.flops  # of the two models


@pytest.fixture(scope="module")
def pruned(place, tmp_path_factory):
    """The tower pruned by magnitude."""
    out = tmp_path_factory.mktemp("pruned")
    assert main(line_of(place, place / "model", out)) == 0
    return run_of(out)


@pytest.mark.parametrize("method", METHODS)
def test_an_open_clip_tower_is_pruned_saved_and_taken_back_by_open_clip(place, pruned, tmp_path, method):
    if method != "magnitude":
        assert main(line_of(place, place / "model", tmp_path, method)) == 0
    run = pruned if method == "magnitude" else run_of(tmp_path)
    masks, before, after = masks_of(run), weights_of(place / "model"), weights_of(run / "model")
    total = sum(mask.numel() for mask in masks.values())
    assert total == 2 * (4 * WIDTH**2 + 2 * WIDTH * 2 * WIDTH)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.4 * total)
    for name, mask in masks.items():
        assert not after[name][~mask].any()
        assert (after[name] != before[name])[mask].float().mean() > 0.9, name  # out_proj too is no frozen parameter
    assert main(["test", str(run)]) == 0
    assert json.loads((run / "report.json").read_text())["test"]["accuracy"] > 0.5
    model, pixels = load(run / "model"), torch.randn(2, 3, SIDE, SIDE, generator=cpu_generator(1))
    clip = sys.modules["open_clip"].CLIP(*TABLE.values()).eval()
    clip.visual.load_state_dict({n.removeprefix("visual."): t for n, t in after.items() if n.startswith("visual.")})
    with torch.no_grad():
        assert model.visual(pixels).equal(clip.encode_image(pixels))


def test_a_pruned_open_clip_tower_is_packed_and_its_ticket_applied(place, pruned, tmp_path):
    for to in ("dense", "packed"):
        assert main(["export", str(pruned), "--to", to, "--out", str(tmp_path / to)]) == 0
    told = json.loads((tmp_path / "dense" / "export.json").read_text())["load"]
    assert told == "sparsesoup.hub.models.open_clip.OpenClipForImageClassification.from_pretrained(folder)"
    import sparsesoup

    assert same(sparsesoup.load_packed(tmp_path / "packed").state_dict(), load(pruned / "model").state_dict())
    assert main(["apply", str(pruned), "--model", str(place / "model"), "--out", str(tmp_path / "copy")]) == 0
    assert same(masks_of(tmp_path / "copy"), masks_of(pruned))


def test_a_pruned_open_clip_tower_is_measured_and_becomes_a_graph(pruned, tmp_path):
    graph = tmp_path / "graph"
    words = ("--batch", "2", "--rounds", "3", "--backends", "torch")
    assert main(["benchmark", str(pruned), *words]) == 0
    facts = json.loads((pruned / "benchmark.json").read_text())
    assert facts["sizes"]["dense"]["parameters"] == facts["sizes"]["this"]["parameters"]
    assert [row["flops_ratio"] for row in facts["rows"]] == [1.0]
    assert main(["export", str(pruned), "--to", "onnx", "--out", str(graph)]) == 0
    assert json.loads((graph / "export.json").read_text())["largest_difference"] < 1e-4
    assert sum(p.numel() for p in open_candidate(graph).dense.parameters()) == facts["sizes"]["dense"]["parameters"]


def test_the_size_of_images_is_read_as_timm_says_it_and_refused_where_nothing_does():
    class Seer(transformers.PreTrainedModel):
        config_class, main_input_name = transformers.TimmWrapperConfig, "pixel_values"

        def __init__(self, config):
            super().__init__(config)
            self.head = nn.Linear(1, 1)

    config = transformers.TimmWrapperConfig(pretrained_cfg={"input_size": [1, 8, 12]})
    assert dummy_inputs(Seer(config))["pixel_values"].shape == (2, 1, 8, 12)
    with pytest.raises(UserError, match=r"config\.json of a timm_wrapper model does not say how large its images are"):
        dummy_inputs(Seer(transformers.TimmWrapperConfig()))


def test_what_is_no_checkpoint_of_open_clip_is_refused_and_one_that_is_says_how_to_take_it(place, tmp_path, capsys):
    assert main(line_of(place, place / "source", tmp_path / "runs")) == 2
    assert "sparsesoup.from_open_clip(" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"photos is no open_clip checkpoint .*open_clip_config.json"):
        from_open_clip(place / "photos", tmp_path / "new")
    with pytest.raises(UserError, match="is there already"):
        from_open_clip(place / "source", place / "model")
    source(tmp_path / "long", resize_mode="longest")
    with pytest.raises(UserError, match="by longest and bicubic"):
        from_open_clip(tmp_path / "long", tmp_path / "new")
    save_file({"visual.proj": torch.zeros(WIDTH, 8)}, tmp_path / "long" / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"visual\..* is missing or too many"):
        from_open_clip(tmp_path / "long", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_open_clip_the_model_says_what_to_install(place, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert main(line_of(place, place / "model", tmp_path / "runs")) == 2
    said = capsys.readouterr().err
    assert "sparsesoup[images]" in said
    assert said.count("\n") == 1


def test_blocks_in_a_sequential_are_found_where_there_is_no_list_of_them():
    class Timm(transformers.PreTrainedModel):
        config_class = transformers.ViTConfig
        base_model_prefix = "timm_model"

        def __init__(self, config):
            super().__init__(config)
            self.timm_model = nn.Module()
            self.timm_model.stem = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.timm_model.blocks = nn.Sequential(Block(8, 2), Block(8, 2))
            self.timm_model.head = nn.Linear(8, 3)

    found = find_prunable(Timm(transformers.ViTConfig()))
    assert [*found] == [f"timm_model.blocks.{i}.{name}" for i in range(2) for name in MATRICES]


def test_a_model_of_timm_is_pruned_saved_and_loaded_by_stock_transformers(place, tmp_path):
    if not library("timm"):
        pytest.skip("timm, or a torchvision that fits torch, is not there: pip install 'sparsesoup[images]'")
    shape = {"depth": 2, "embed_dim": WIDTH, "num_heads": 2, "img_size": SIDE, "patch_size": PATCH}
    seen = {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=shape, num_labels=5, pretrained_cfg={**seen, "crop_pct": 1.0}
    )
    torch.manual_seed(0)
    transformers.TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "timm")
    for method in METHODS:
        assert main(line_of(place, tmp_path / "timm", tmp_path / method, method)) == 0
        run = run_of(tmp_path / method)
        masks, model = masks_of(run), load(run / "model")
        assert len(masks) == 8
        assert any(name.endswith("attn.qkv.weight") for name in masks)
        assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
        assert model.config.num_labels == 3
        assert main(["test", str(run)]) == 0
