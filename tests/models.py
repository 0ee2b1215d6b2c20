"""Small stock models, inputs and masks, and what tests ask of a report."""

import torch
import transformers

import bert_fast
from bert_fast import modeling
from bert_fast.kernels.launch import INTERPRET

B, S = 5, 23
HEADS = [cls.__name__ for cls in modeling.CLASSES]
if INTERPRET:  # slow, and what differs from head to head is transformers' code
    HEADS = ["BertModel", "BertForSequenceClassification"]
HALVES = [torch.float16, torch.bfloat16]


def config_of(**changes):
    return transformers.BertConfig(
        **{
            "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 100, "max_position_embeddings": 40, "num_labels": 3,
            "initializer_range": 0.2,  # attention that is neither uniform nor one-hot
            **changes,
        }
    )  # fmt: skip


def stock_model(name="BertModel", device="cpu", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    changes.setdefault("num_labels", 2 if name == "BertForQuestionAnswering" else 3)
    model = getattr(transformers, name)(config_of(**changes)).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "LayerNorm" in parameter_name or parameter_name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
    return model.to(device, dtype)


def ids_of(device="cpu", shape=(B, S), high=99):
    return torch.randint(high, shape, generator=torch.manual_seed(1)).to(device)


def masks(device="cpu"):
    position = torch.arange(S)
    right = position < torch.tensor([S, 1, 7, 16, 17])[:, None]
    holes = (position * 7 + torch.arange(B)[:, None]) % 3 > 0
    zero_row = right & (torch.arange(B) != 2)[:, None]
    kinds = {
        "none": None,
        "full": torch.ones(B, S),
        "right": right.long(),
        "left": right.flip(1).int(),
        "holes": holes,
        "a row of zeros": zero_row.float(),
        "all zeros": torch.zeros(B, S, dtype=torch.uint8),
        "strided": right.long().repeat_interleave(2, 1)[:, ::2],
        "negative is a token": -right.float(),
    }
    return {k: m if m is None else m.to(device) for k, m in kinds.items()}


def tokens(mask, device):
    """bool[B, S]: where outputs mean something, rows of no token left out."""
    if mask is None:
        return torch.ones(B, S, dtype=torch.bool, device=device)
    return mask != 0


def fast_calls(model):
    return [(s.fast_calls, s.stock_calls) for s in bert_fast.report(model).swapped]


def assert_ran_fast(model):
    for fast, stock in fast_calls(model):
        assert fast > 0
        assert not stock


def assert_ran_stock(model, reason):
    ((fast, stock),) = fast_calls(model)
    assert fast == 0
    (said,) = stock
    assert reason in said
