"""Every snippet of the guide on other libraries, run on tiny models."""

import re
from pathlib import Path
from typing import Any

import datasets
import lightning
import numpy as np
import pytest
import torch
from safetensors.torch import load_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from conftest import same
from sparsesoup import UserError, export, load_packed, prune
from sparsesoup.cli.main import main
from tiny_hub import CONFIGS, sentences, tokenizer
from tiny_objects import ROWS, STEPS, TRAIN, OwnLoss, classifier, model_of, trainer_of

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "libraries.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
TEXTS = [text for text, _ in sentences(64, 1)]


class Module(lightning.LightningModule):
    """A model with its optimizer, as users of Lightning have it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = classifier()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def decoder() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=3)
    )  # fmt: skip


def embedder(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS["bert"]()).save_pretrained(folder)
    tokenizer(pairs=True).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)], device="cpu")


def ending() -> Any:
    tool = tokenizer(pairs=False)
    tool.eos_token = "[SEP]"
    return tool


OBJECTS: dict[str, Any] = {
    "steps": lambda folder: STEPS,
    "folder": lambda folder: str(folder / "out"),
    "trainer": lambda folder: trainer_of(folder / "trainer", [], OwnLoss, max_steps=150),
    "decoder": lambda folder: decoder(),
    "tokenizer": lambda folder: ending(),
    "prompts": lambda folder: datasets.Dataset.from_dict({"text": TEXTS}),
    "embedder": lambda folder: embedder(folder / "bert"),
    "embedder_arguments": lambda folder: SentenceTransformerTrainingArguments(
        str(folder / "out"), max_steps=STEPS, use_cpu=True, report_to="none"
    ),
    "sentence_pairs": lambda folder: datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
    "lightning_module": lambda folder: Module(),
    "loader": lambda folder: torch.utils.data.DataLoader(
        [{name: torch.tensor(value) for name, value in ROWS[i].items()} for i in range(len(ROWS))],  # type: ignore
        batch_size=4,
    ),
    "quiet": lambda folder: {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    },
    "several": lambda folder: model_of(num_labels=3),
    "several_rows": lambda folder: TRAIN.map(lambda row: {"labels": [float(row["labels"]), 1.0, 0.0]}),
}


# Of the libraries: about themselves, transformers and torch; and ours about TRL's arguments.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_of_another_library_runs_and_prunes(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = SNIPPETS[number]
    lines = [line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) <= 15
    given = {name: make(tmp_path) for name, make in OBJECTS.items() if re.search(rf"\b{name}\b", code)}
    exec(compile(code, GUIDE.name, "exec"), given)
    pruned = given.get("pruned")
    masks = given["masks"] if pruned is None else pruned.masks
    assert sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()) == pytest.approx(
        0.7, abs=0.01
    )
    if pruned is not None:
        model: Any = pruned.model
    elif "lightning_module" in given:
        model = given["lightning_module"].model
    else:
        model = given["trainer"].model
    params = {name: p for name, p in model.named_parameters() if name in masks}
    assert params.keys() == masks.keys()
    assert not any(bool(p[~masks[name]].any()) for name, p in params.items())
    if "decoder" in given:
        check_it_answers_with_its_own_weights(model)


def check_it_answers_with_its_own_weights(model: Any) -> None:
    """TRL puts a forward pass of its own in front of that of the model."""
    stock, ids = decoder().eval(), torch.arange(5, 25)[None]
    assert not same(stock.state_dict(), model.state_dict())
    stock.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_a_pruned_embedder_is_saved_and_exported_and_loaded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trainer() -> SentenceTransformerTrainer:
        model, pairs = embedder(tmp_path / "bert"), OBJECTS["sentence_pairs"](tmp_path)
        given = OBJECTS["embedder_arguments"](tmp_path)
        return SentenceTransformerTrainer(model, given, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))

    found = prune("gradual", trainer=trainer(), sparsity=0.5, out=tmp_path / "runs", progress=False)
    expected = found.model.encode(TEXTS[:4])
    again = prune("gradual", trainer=trainer(), sparsity=0.5, out=tmp_path / "runs", progress=False)
    assert np.array_equal(again.model.encode(TEXTS[:4]), expected)  # read, not run
    folder = found.save(tmp_path / "run")
    assert main(["show", str(folder)]) == 0
    assert " on objects by gradual: 50.0 %" in capsys.readouterr().out
    for form in ("dense", "packed"):
        made = export(folder, form, tmp_path / form).path
        fresh = embedder(tmp_path / "bert")
        load_packed(made, fresh) if form == "packed" else load_model(fresh, made / "model.safetensors")
        assert np.array_equal(fresh.encode(TEXTS[:4]), expected)
    for form in ("compact", "onnx"):
        with pytest.raises(UserError, match="a module that is none of transformers', whose class no file names"):
            export(folder, form, tmp_path / form)
    found.model.save_pretrained(str(tmp_path / "stock"))
    assert np.array_equal(SentenceTransformer(str(tmp_path / "stock"), device="cpu").encode(TEXTS[:4]), expected)
