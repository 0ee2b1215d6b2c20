"""Small stock models, inputs and masks, and what tests ask of a report."""

import copy

import torch
import transformers

import bert_fast
from bert_fast import modeling
from bert_fast.kernels.launch import INTERPRET

B, S = 5, 23
CLASSES = [cls.__name__ for cls in modeling.CLASSES]
if transformers.__version__ < "5.1":  # where stock itself fails: these two have no pooler
    CLASSES.remove("CamembertForMultipleChoice")
    CLASSES.remove("XLMRobertaForMultipleChoice")
HEADS = [name for name in CLASSES if name.startswith("Bert")]
if INTERPRET:  # slow, and what differs from head to head is transformers' code
    HEADS = ["BertModel", "BertForSequenceClassification"]
FEW = {"num_hidden_layers": 1} if INTERPRET else {}  # slow, and a second layer is one more of it
HALVES = [torch.float16, torch.bfloat16]


def config_of(name="BertModel", **changes):
    """The config of a small model of a class of transformers, whatever its architecture."""
    changes = {
        "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 100, "max_position_embeddings": 40,
        "num_labels": 2 if name.endswith("QuestionAnswering") else 3,
        "initializer_range": 0.2,  # attention that is neither uniform nor one-hot
        **changes,
    }  # fmt: skip
    if name.startswith("Electra"):
        changes.setdefault("embedding_size", 48)
    if name.startswith("DistilBert"):
        changes["hidden_dim"] = changes.pop("intermediate_size")
    return getattr(transformers, name).config_class(**changes)


def stock_model(name="BertModel", device="cpu", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config_of(name, **changes)).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "norm" in parameter_name.lower() or parameter_name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
    return model.to(device, dtype)


def ids_of(device="cpu", shape=(B, S), high=99):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1)).to(device)


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


# -- comparisons with stock, for every architecture -----------------------------------------
def assert_same_vectors(name, mask, device):
    """One mask, without gradients: stock's numbers at tokens, zeros elsewhere."""
    stock = stock_model(name, device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    keywords = {"input_ids": ids_of(device), "attention_mask": mask}
    if not name.startswith("DistilBert"):
        types = stock.config.type_vocab_size
        keywords["token_type_ids"] = ids_of(device, high=types)
    with torch.no_grad():
        ours, theirs = (m(**keywords) for m in (fast, stock))
    where = tokens(mask, device)
    assert_ran_fast(fast)
    assert ours.keys() == theirs.keys()
    apart = (ours.last_hidden_state - theirs.last_hidden_state)[where]
    assert apart.numel() == 0 or apart.abs().max() < 1e-5
    assert not ours.last_hidden_state[~where].any()
    if "pooler_output" in theirs:
        first = where[:, 0]
        torch.testing.assert_close(
            ours.pooler_output[first], theirs.pooler_output[first], atol=1e-5, rtol=0
        )
        assert ours.pooler_output.isfinite().all()


def loss_of(name, model, ids, mask):
    """The outputs of a model with a head that has labels, so that gradients can be compared.

    Positions without a token carry no label: stock has numbers without a meaning there.
    """
    labels = ids.masked_fill(mask == 0, -100)
    keywords = {"input_ids": ids, "attention_mask": mask}
    classes = torch.arange(B, device=ids.device) % 2
    head = name.partition("For")[2]
    if head == "MultipleChoice":
        keywords = {k: v[:4].view(2, 2, S) for k, v in keywords.items()}
        keywords["labels"] = classes[:2]
    elif name == "BertForPreTraining":
        keywords |= {"labels": labels, "next_sentence_label": classes}
    elif head in ("NextSentencePrediction", "SequenceClassification"):
        keywords["labels"] = classes
    elif head == "TokenClassification":
        keywords["labels"] = torch.where(labels < 0, labels, labels % 3)
    elif name == "ElectraForPreTraining":
        keywords["labels"] = ids % 2  # its loss knows the attention mask
    elif head in ("MaskedLM", "CausalLM") or name == "BertLMHeadModel":
        keywords["labels"] = labels
    # Question answering has none: its softmax runs over all positions, and differs by design.
    out = model(**keywords)
    if out.get("loss") is not None:
        return out, out.loss
    values = out.start_logits if "start_logits" in out else out.last_hidden_state[..., 0]
    return out, (values * (mask != 0)).square().mean()


def assert_same_training(name, device):
    """A constructed bert_fast class with stock's weights: outputs, loss and every gradient."""
    stock = stock_model(name, device)
    fast = getattr(bert_fast, name)(stock.config).eval().to(device)
    fast.load_state_dict(stock.state_dict())
    assert isinstance(fast, getattr(transformers, name))
    assert fast.state_dict().keys() == stock.state_dict().keys()
    mask = masks(device)["right"]
    (ours, our_loss), (theirs, their_loss) = (
        loss_of(name, model, ids_of(device), mask) for model in (fast, stock)
    )
    assert_ran_fast(fast)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(our_loss, their_loss, atol=1e-5, rtol=1e-5)
    our_loss.backward()
    their_loss.backward()
    for (key, p), (_, q) in zip(fast.named_parameters(), stock.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if q.grad is not None:
            scale = q.grad.abs().max().item()
            torch.testing.assert_close(
                p.grad, q.grad, atol=1e-5 + 1e-4 * scale, rtol=0, msg=lambda m, k=key: f"{k} {m}"
            )


def assert_errs_no_more_than_stock(name, dtype, device, autocast=False):
    """Root mean square error against fp64: at most 1.2 times stock's in the same dtype, or under
    autocast to it."""
    stock = stock_model(name, device, torch.float32 if autocast else dtype, **FEW)
    exact = copy.deepcopy(stock).double()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    # Enough sequences for a mean of pooled outputs; in the interpreter, which is slow, of fewer.
    mask = masks(device)["right"].repeat(4 if INTERPRET else 12, 1)
    keywords = {"input_ids": ids_of(device, shape=mask.shape), "attention_mask": mask}
    if name.endswith("MultipleChoice"):
        keywords = {k: v.view(-1, 2, S) for k, v in keywords.items()}
    with torch.no_grad():
        truth = exact(**keywords)[0]
        with torch.autocast(device, dtype, enabled=autocast):
            ours, theirs = (model(**keywords)[0] for model in (fast, stock))
    assert ours.dtype == theirs.dtype
    where = mask != 0 if truth.shape[:2] == mask.shape else slice(None)
    error, allowed = ((x.double() - truth)[where].square().mean().sqrt() for x in (ours, theirs))
    assert_ran_fast(fast)
    assert error <= 1.2 * allowed
