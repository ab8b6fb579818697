"""How many tokens a model takes is as many as it can be asked about."""

from typing import Any

import pytest
import torch
import transformers

from sparsesoup.hub.build import max_positions
from tiny_hub import COMMON, SHAPE

pytestmark = pytest.mark.integration

BARE: dict[str, Any] = {name: value for name, value in SHAPE.items() if name != "type_vocab_size"}
KINDS = {
    "roberta": lambda pad: transformers.RobertaConfig(**(COMMON | {"pad_token_id": pad}), **SHAPE),
    "camembert": lambda pad: transformers.CamembertConfig(**(COMMON | {"pad_token_id": pad}), **SHAPE),
    "data2vec-text": lambda pad: transformers.Data2VecTextConfig(**(COMMON | {"pad_token_id": pad}), **SHAPE),
    "ibert": lambda pad: transformers.IBertConfig(**(COMMON | {"pad_token_id": pad}), **SHAPE),
    "mpnet": lambda pad: transformers.MPNetConfig(**(COMMON | {"pad_token_id": pad}), **BARE),
    "luke": lambda pad: transformers.LukeConfig(**(COMMON | {"pad_token_id": pad}), **SHAPE),
    "esm": lambda pad: transformers.EsmConfig(
        **(COMMON | {"pad_token_id": pad}), **BARE, position_embedding_type="absolute", mask_token_id=4
    ),
    "bert": lambda pad: transformers.BertConfig(**(COMMON | {"pad_token_id": pad}), **SHAPE),
}


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_all_positions_is_answered_and_a_longer_one_is_not(kind: str, pad: int) -> None:
    model = transformers.AutoModel.from_config(KINDS[kind](pad)).eval()
    most = int(max_positions(model))
    with torch.no_grad():
        assert model(input_ids=torch.full((1, most), 7)).last_hidden_state.shape[1] == most
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 7))
