"""A row gets the same answer alone and in any batch, before and after others, in what is trained and what is saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.checkpoint import load_tokenizer
from sparsesoup.hub.models.loading import load_model, save_model
from sparsesoup.hub.models.padding_probe import probe_padding
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.hub.tasks.registry import CLASSES
from sparsesoup.training.problem import Problem
from tiny_hub import COMMON, CONFIGS, base_model, tokenizer, write_rows

pytestmark = pytest.mark.integration

WIDE: dict[str, Any] = {**COMMON, "eos_token_id": 3, "bos_token_id": 2, "hidden_size": 16, "num_hidden_layers": 2,
                        "num_attention_heads": 2}  # fmt: skip
SEQ: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0,
                       "decoder_start_token_id": 2}  # fmt: skip
BIG: dict[str, Any] = {**WIDE, "intermediate_size": 32, "block_size": 4, "num_random_blocks": 1}
DECODERS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=132),
    "llama": lambda: transformers.LlamaConfig(**WIDE, intermediate_size=32, num_key_value_heads=1),
    "opt": lambda: transformers.OPTConfig(**WIDE, ffn_dim=32, word_embed_proj_dim=16),
    "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
    "bart": lambda: transformers.BartConfig(
        **SEQ, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2, max_position_embeddings=132,
    ),
    "t5": lambda: transformers.T5Config(**SEQ, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
    "xlnet": lambda: transformers.XLNetConfig(**SEQ, d_inner=32, n_layer=2, n_head=2),
    "modernbert": lambda: transformers.ModernBertConfig(**WIDE, intermediate_size=32, cls_token_id=2, sep_token_id=3),
}  # fmt: skip
READING_PADDING = {
    "convbert": lambda: transformers.ConvBertConfig(**WIDE, intermediate_size=32, embedding_size=16, head_ratio=1),
    "fnet": lambda: transformers.FNetConfig(**COMMON, hidden_size=16, intermediate_size=32, num_hidden_layers=2),
}
TEXTS = [
    "good film", "the cast was so very dull and the plot was so cold and empty", "a", "bad [SEP] book </s> [PAD] a",
    "very very good and bright and warm", "the [MASK] was [CLS] poor", "fine", "not a good plot",
]  # fmt: skip
ROWS = [(text, i % 2) for i, text in enumerate(TEXTS)]
# Side of the tokenizer's file, its padding token, what config.json says of it.
PADDINGS = [("left", "[PAD]", None), ("right", None, 4), ("left", None, -1), ("right", "[PAD]", 7)]


def published(folder: Path, config: Any, side: str = "right", token: str | None = "[PAD]", pairs: bool = False) -> Path:
    """A base model of random weights, with a tokenizer that pads on a side with a token, or knows none."""
    with torch.random.fork_rng(), quiet_libraries():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.3)
        model.save_pretrained(folder)
        made = tokenizer(pairs)
        made.padding_side, made.pad_token = side, token
        made.eos_token = made.sep_token
        made.save_pretrained(folder)
    return folder


def built(model: Path, data: Path, rows: Any = ROWS, columns: tuple[str, ...] = ("text", "label")) -> Problem:
    write_rows(data / "train.csv", columns, rows)
    where = ModelAndDataConfig(model=str(model), dataset=str(data))
    return build_problem(where, open_task(where), steps=1)


def answers(problem: Problem, rows: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return problem.predict(problem.pretrained.eval(), problem.train.batch(rows))


def apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(("side", "token", "told"), PADDINGS)
@pytest.mark.parametrize("family", [*DECODERS, *(f for f in CONFIGS if f != "roberta")])
def test_a_row_is_answered_alone_as_in_any_batch_by_what_is_trained_and_by_what_is_saved(
    family: str, side: str, token: str | None, told: int | None, tmp_path: Path
) -> None:
    config = {**CONFIGS, **DECODERS}[family]()
    config.pad_token_id = told
    model = published(tmp_path / "model", config, side, token)
    if family in ("bart", "t5") and token is None:  # it pads with the end of text, of which a row may have one
        with pytest.raises(UserError, match=r"cannot answer a row of \d+ tokens .*<eos>"):
            built(model, tmp_path / "data")
        return
    problem = built(model, tmp_path / "data")
    reader = load_tokenizer(str(model))
    assert problem.pretrained.config.pad_token_id == reader.pad_token_id
    save_model(problem.pretrained, problem.pretrained.state_dict(), tmp_path / "saved", reader, {})
    with quiet_libraries():
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
        words = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.config.pad_token_id == words.pad_token_id == reader.pad_token_id
    texts = [row[0] for row in ROWS]
    kept = list(range(len(problem.train)))
    alone = torch.cat([answers(problem, [i]) for i in kept])
    assert not apart(alone, answers(problem, kept))
    assert not apart(alone[[2, 0]], answers(problem, [kept[2], kept[0]]))
    shown = [tuple(problem.train.batch([i])["input_ids"][0].tolist()) for i in kept]
    with torch.no_grad():
        for text in texts:
            row = words([text], return_tensors="pt")
            if (ids := tuple(row["input_ids"][0].tolist())) in shown:
                assert not apart(saved(**row).logits[0], alone[shown.index(ids)])
        assert not apart(saved(**words(texts, padding=True, return_tensors="pt")).logits[0],
                         saved(**words(texts[:1], return_tensors="pt")).logits[0])  # fmt: skip


@pytest.mark.parametrize("family", READING_PADDING)
def test_a_family_whose_answers_depend_on_the_padding_is_refused_before_the_first_step(
    family: str, tmp_path: Path
) -> None:
    model = published(tmp_path / "model", READING_PADDING[family]())
    with pytest.raises(UserError, match=r"answers a row otherwise beside a longer one than alone, by .*padding"):
        built(model, tmp_path / "data")


def test_positions_that_are_counted_from_another_padding_token_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["roberta"]()
    config.pad_token_id = 1
    model = published(tmp_path / "model", config)
    with pytest.raises(UserError, match=r"pad_token_id 1, from which .* pads with \[PAD\] \(token 0\); correct"):
        built(model, tmp_path / "data")


def test_another_padding_token_is_noted(tmp_path: Path) -> None:
    config = DECODERS["llama"]()
    config.pad_token_id = 4
    notes = built(published(tmp_path / "model", config, token=None), tmp_path / "data").notes
    assert [note for note in notes if "pads with token 4 and its tokenizer with 3" in note]


@pytest.mark.parametrize("family", ["bert", "bart", "gpt2"])
def test_a_special_token_that_a_text_names_is_text(family: str, tmp_path: Path) -> None:
    config = {**CONFIGS, **DECODERS}[family]()
    model = published(tmp_path / "model", config)
    stock, own = AutoTokenizer.from_pretrained(model), load_tokenizer(str(model))
    own.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    special = [i for i in stock.all_special_ids if i != stock.unk_token_id]
    for text in TEXTS:
        found = own(text, add_special_tokens=False)["input_ids"]
        assert not {*found} & {*special}, text
        assert saved(text, add_special_tokens=False)["input_ids"] == found
        if not any(word in text for word in stock.all_special_tokens):
            assert own(text)["input_ids"] == stock(text)["input_ids"]


def test_token_types_that_a_model_has_not_are_not_given(tmp_path: Path) -> None:
    rows, columns = [("good", text, i) for text, i in ROWS], ("first", "second", "label")
    for config in (CONFIGS["bert"](type_vocab_size=1), CONFIGS["distilbert"]()):
        model = published(tmp_path / config.model_type, config, pairs=True)
        assert "token_type_ids" not in built(model, tmp_path / "data", rows, columns).train.batch([0, 1])
    model = published(tmp_path / "two", CONFIGS["bert"](), pairs=True)
    assert built(model, tmp_path / "data", rows, columns).train.batch([0])["token_type_ids"].max() == 1


def test_a_mask_is_made_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    model = published(tmp_path / "model", CONFIGS["bert"]())
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids"]}))
    assert "attention_mask" in built(model, tmp_path / "data").train.batch([0, 1])


@pytest.mark.parametrize("kind", [transformers.BigBirdConfig, transformers.BigBirdPegasusConfig])
def test_bigbird_is_given_full_attention_before_the_first_step_and_keeps_it(kind: Any, tmp_path: Path) -> None:
    more = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16}
    more |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
    config = kind(**(BIG | (more if kind is transformers.BigBirdPegasusConfig else {})))
    rows = [(f"{text} {'very ' * 40 if i % 2 else ''}", i % 2) for i, text in enumerate(TEXTS)]
    problem = built(published(tmp_path / "model", config), tmp_path / "data", rows)
    assert problem.pretrained.config.attention_type == "original_full"
    assert [note for note in problem.notes if "full attention" in note]
    assert {m.attention_type for m in problem.pretrained.modules() if hasattr(m, "attention_type")} == {"original_full"}


def test_a_model_that_remembers_what_it_was_asked_is_refused_with_the_name_of_its_state(tmp_path: Path) -> None:
    """As BigBird left alone does, and as a counter that lives in Python would."""
    rows = [(f"{text} {'very ' * 40 if i % 2 else ''}", i % 2) for i, text in enumerate(TEXTS)]
    model = published(tmp_path / "model", transformers.BigBirdConfig(**BIG))
    problem = built(model, tmp_path / "data", rows)
    task = open_task(ModelAndDataConfig(model=str(model), dataset=str(tmp_path / "data"))).task
    with pytest.raises(UserError, match=r"after it was asked another.*such as bert\.attention_type"):
        probe_padding("x", CLASSES, load_model(str(model), task, 0, fixed={"pad_token_id": 0}), problem.train)

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.asked, self.inner = 0, base_model("bert")

        def forward(self, **batch: Any) -> Any:
            self.asked += 1
            return transformers.modeling_outputs.SequenceClassifierOutput(
                logits=self.inner(**batch).pooler_output[:, :2] * (1 + self.asked % 7)
            )

    with pytest.raises(UserError, match=r"after it was asked another.*such as asked"):
        probe_padding("x", CLASSES, Counting(), problem.train)
