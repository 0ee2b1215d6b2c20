"""Libraries that people put around BERT, as they are, around an accelerated one."""

import copy
import multiprocessing
import threading

import accelerate
import numpy as np
import onnxruntime
import peft
import pytest
import sentence_transformers
import torch
import transformers
from models import B, S, assert_ran_fast, fast_calls, ids_of, masks, stock_model
from safetensors.torch import load_file, load_model, save_model

import bert_fast
from bert_fast.checkpoints import SHIPPED

TEXTS = [
    "This is an example sentence.",
    "A longer one, of which the others in its batch know nothing at all, as they are shorter.",
    "One.",
    "",
]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped checkpoint with a head of three classes, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shipped")
    model = transformers.BertForSequenceClassification.from_pretrained(SHIPPED, num_labels=3)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


def batch(device="cpu"):
    return {"input_ids": ids_of(device), "attention_mask": masks(device)["right"]}


# -- sentence-transformers ------------------------------------------------------------------
@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_sentence_embeddings_stay_saved_and_loaded_too(pooling, tmp_path, device):
    from sentence_transformers import models as parts

    words = parts.Transformer(str(SHIPPED))
    pool = parts.Pooling(words.get_word_embedding_dimension(), pooling_mode=pooling)
    model = sentence_transformers.SentenceTransformer(modules=[words, pool], device=device)
    expected = model.encode(TEXTS, batch_size=3)
    bert_fast.accelerate(model)
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=3), expected, atol=1e-5)
    assert_ran_fast(model)
    model.save(str(tmp_path))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path), device=device)
    assert type(loaded[0].auto_model) is transformers.BertModel
    np.testing.assert_array_equal(loaded.encode(TEXTS, batch_size=3), expected)


def test_a_cross_encoder_gives_the_scores_of_stock(shipped, device):
    model = sentence_transformers.CrossEncoder(str(shipped), device=device)
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    expected = model.predict(pairs)
    bert_fast.accelerate(model)
    np.testing.assert_allclose(model.predict(pairs), expected, atol=1e-5)
    assert_ran_fast(model)


# -- pipelines ------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["feature-extraction", "fill-mask", "text-classification"])
def test_a_pipeline_gives_what_stock_gives(task, shipped, device):
    texts = [text + " [MASK] ." for text in TEXTS] if task == "fill-mask" else TEXTS
    where = SHIPPED if task == "fill-mask" else shipped
    stock = transformers.pipeline(task, model=str(where), device=device)
    fast = transformers.pipeline(task, model=str(where), device=device)
    bert_fast.accelerate(fast.model)
    for alone, batched in zip(stock(texts), fast(texts, batch_size=3)):
        if task == "feature-extraction":  # batched, it hands out the padding too
            alone, batched = np.array(alone[0]), np.array(batched[0])[: len(alone[0])]
            np.testing.assert_allclose(batched, alone, atol=2e-5)
        else:
            best = [one[0] if isinstance(one, list) else one for one in (alone, batched)]
            assert best[0].pop("score") == pytest.approx(best[1].pop("score"), abs=1e-5)
            assert best[0] == best[1]
    assert_ran_fast(fast.model)


# -- PEFT -----------------------------------------------------------------------------------
def test_lora_trains_as_on_stock_and_merged_runs_on_the_kernels(device):
    names = ["query", "value"]
    config = peft.LoraConfig(target_modules=names, init_lora_weights=False, lora_dropout=0.0)
    losses, merged = [], []
    for accelerated in (False, True):
        model = stock_model("BertForSequenceClassification", device=device)
        if accelerated:
            bert_fast.accelerate(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model(**batch(device), labels=torch.arange(B, device=device) % 3).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        merged.append(model.merge_and_unload().eval())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    assert losses[2] < losses[0]
    ((fast, stock),) = fast_calls(merged[1])
    assert fast == 0
    assert list(stock) == ["encoder.layer.0.attention.self.query: peft.tuners.lora.layer.Linear"]
    with torch.no_grad():
        expected, ours = (model(**batch(device)).logits for model in merged)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    assert fast_calls(merged[1])[0][0] == 1


# -- Accelerate -----------------------------------------------------------------------------
def test_a_device_map_loads_and_runs(shipped):
    stock = transformers.BertForSequenceClassification.from_pretrained(shipped)
    fast = bert_fast.BertForSequenceClassification.from_pretrained(shipped, device_map="cpu")
    inputs = {**batch()}
    with torch.no_grad():
        torch.testing.assert_close(
            fast(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0
        )
    assert_ran_fast(fast)


@torch.no_grad()
def test_tools_that_look_at_storages_save_every_weight(tmp_path):
    """They leave out a tensor that shares its storage with another."""
    fast = bert_fast.accelerate(stock_model())
    fast(ids_of())
    accelerate.Accelerator(cpu=True).save_model(fast, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == fast.state_dict().keys()
    save_model(fast, tmp_path / "whole.safetensors")
    other = transformers.BertModel(fast.config).eval()
    load_model(other, tmp_path / "whole.safetensors")
    torch.testing.assert_close(other(ids_of())[0], fast(ids_of())[0], atol=1e-5, rtol=0)


def test_offloaded_weights_run_stock_and_the_hooks_are_named(device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    accelerate.cpu_offload(fast, execution_device=device)
    with torch.no_grad():
        expected, ours = stock(**batch(device))[0], fast(**batch(device))[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    ((count, reasons),) = fast_calls(fast)
    assert count == 0
    assert len(reasons) == 1


def test_accelerator_prepares_and_trains(device):
    losses = []
    for accelerated in (False, True):
        model = stock_model(
            "BertForSequenceClassification", device=device,
            hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        )  # fmt: skip
        if accelerated:
            bert_fast.accelerate(model)
        accelerator = accelerate.Accelerator(cpu=device == "cpu")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        for _ in range(3):
            loss = model(**batch(device), labels=torch.arange(B, device=device) % 3).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)
    assert_ran_fast(model)


# -- export ---------------------------------------------------------------------------------
def test_torch_export_has_our_ops_and_any_batch_saved_and_loaded_too(device, tmp_path):
    fast = bert_fast.accelerate(stock_model(device=device))
    size = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=40)}
    with torch.no_grad():
        program = torch.export.export(
            fast, (), batch(device),
            dynamic_shapes={"input_ids": size, "attention_mask": size},
        )  # fmt: skip
        called = {str(node.target) for node in program.graph.nodes}
        assert "bert_fast.attention.default" in called
        assert "aten.scaled_dot_product_attention.default" not in called
        inputs = {"input_ids": ids_of(device, (3, 11)), "attention_mask": masks(device)["right"]}
        inputs["attention_mask"] = inputs["attention_mask"][2:, :11].contiguous()
        expected = fast(**inputs)
        torch.export.save(program, tmp_path / "model.pt2")
        for same in (program, torch.export.load(tmp_path / "model.pt2")):
            ours = same.module()(**inputs)
            torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state)


def test_an_exported_program_trains(device):
    stock = stock_model(device=device).train()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    gradients = []
    for m in (stock, fast):
        for part in m.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        program = torch.export.export(m, (ids_of(device),)).module()
        program(ids_of(device)).last_hidden_state.square().mean().backward()
        gradients.append({name: p.grad for name, p in program.named_parameters()})
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, atol=1e-4, rtol=1e-3, msg=name)


def test_torch_export_runs_hooks_inside(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    fast.encoder.layer[0].register_forward_hook(lambda module, inputs, output: output * 0)
    with torch.no_grad():
        program = torch.export.export(fast, (), batch(device))
        expected, ours = fast(**batch(device))[0], program.module()(**batch(device))[0]
    torch.testing.assert_close(ours, expected)


def test_restored_it_exports_to_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")
    stock = stock_model()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        expected = fast(**batch())[0]
    bert_fast.restore(fast)
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        fast, (), file, kwargs=batch(), input_names=["input_ids", "attention_mask"], dynamo=True
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    ours = session.run(None, {name: t.numpy() for name, t in batch().items()})[0]
    there = masks()["right"].bool()
    torch.testing.assert_close(torch.from_numpy(ours)[there], expected[there], atol=2e-5, rtol=0)


# -- quantized, replicated, threads, processes ----------------------------------------------
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantized_model_runs_stock_and_is_named():
    stock = torch.ao.quantization.quantize_dynamic(stock_model(), {torch.nn.Linear})
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch())[0], stock(**batch())[0])
    ((count, reasons),) = fast_calls(fast)
    assert count == 0
    assert "quantized" in next(iter(reasons))


def test_data_parallel_gives_what_the_model_gives(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    with torch.no_grad():
        expected = fast(**batch(device))[0]
        ours = torch.nn.DataParallel(fast)(**batch(device))[0]
    assert torch.equal(ours, expected)
    assert fast_calls(fast) == [(2, {})]


def test_sixteen_threads_on_one_model_each_get_their_own_result(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    inputs = [
        {"input_ids": ids_of(device, (1 + i % 5, 3 + i)), "attention_mask": None}
        for i in range(16)
    ]
    with torch.no_grad():
        expected = [fast(**given)[0] for given in inputs]
    wrong = []

    def work(given, result):
        with torch.no_grad():
            wrong.extend(1 for _ in range(8) if not torch.equal(fast(**given)[0], result))

    threads = [threading.Thread(target=work, args=args) for args in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fast_calls(fast) == [(16 + 16 * 8, {})]


def _child(model, inputs, results):
    torch.set_num_threads(1)  # as DataLoader's workers do: OpenMP's threads do not survive a fork
    with torch.no_grad():
        results.put((model(**inputs)[0].numpy(), fast_calls(model)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_gets_the_same_numbers(method):
    fast = bert_fast.accelerate(stock_model())
    with torch.no_grad():
        expected = fast(**batch())[0].numpy()
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    child = context.Process(target=_child, args=(fast, batch(), results))
    child.start()
    ours, calls = results.get()
    child.join()
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert child.exitcode == 0
    assert calls[0][0] == (2 if method == "fork" else 1)
    assert S == ours.shape[1]
