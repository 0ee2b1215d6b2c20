"""CUDA graphs: a forward that is replayed is the forward that is not, to the bit.

On a GPU these are graphs. Without one a stand-in records what PyTorch runs, op by op, and replays
it on the same memory: all is tested but four functions of CUDA's own.
"""

import contextlib
import copy
import gc
import io
import threading
import weakref

import pytest
import torch
import transformers
from models import B, S, config_of, fast_calls, ids_of, masks, stock_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import bert_fast
from bert_fast import encoder, graphs
from bert_fast.graphs import bucket_of, graphs_of
from bert_fast.inputs import Inputs
from bert_fast.kernels.launch import INTERPRET

GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"


class Recording(TorchDispatchMode):
    """What PyTorch runs meanwhile, to run again on the same memory into the same memory."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        output = func(*args, **kwargs)
        if not func.is_view:
            self.steps.append((func, args, kwargs, output))
        return output

    def replay(self):
        for func, args, kwargs, output in self.steps:
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    assert old.shape == new.shape, f"{func} gave {old.shape}, then {new.shape}"
                    old.copy_(new)


def record_steps(forward, pool, device):
    with Recording() as recording:
        output = forward()
    return recording.replay, output


@pytest.fixture(autouse=True)
def a_stand_in(monkeypatch):
    if not GPU:
        monkeypatch.setattr(graphs, "there_are", lambda device: True)
        monkeypatch.setattr(graphs, "_new_pool", lambda device: object())
        monkeypatch.setattr(graphs, "_record", record_steps)
        monkeypatch.setattr(encoder, "_stays_on_device", lambda device: True)
        monkeypatch.setattr(graphs, "in_turn", lambda *_: contextlib.nullcontext())


def pair(name="BertModel", **changes):
    """A model without graphs, and the same with."""
    plain = bert_fast.accelerate(stock_model(name, device=DEVICE, **changes), cuda_graphs=False)
    return plain, bert_fast.accelerate(copy.deepcopy(plain), cuda_graphs=True)


def encoder_of(model):
    return next(m for m in model.modules() if hasattr(m, "architecture"))


def count(model):
    return graphs_of(encoder_of(model)).count


def assert_same(model, plain, **inputs):
    ours, theirs = model(**inputs), plain(**inputs)
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    return ours


def inputs_of(kind="right", shape=(B, S)):
    mask = masks(DEVICE)[kind]
    ids = ids_of(DEVICE, shape)
    return {"input_ids": ids, "attention_mask": mask if mask is None else mask[: len(ids)]}


@pytest.mark.parametrize(
    "name", ["BertModel", "RobertaModel", "ElectraModel", "DistilBertModel",
             "BertForSequenceClassification"],
)  # fmt: skip
def test_any_mask_and_length_in_a_bucket_gives_the_same_bits(name):
    plain, model = pair(name)
    kept = []
    with torch.no_grad():
        for kind in masks():
            output = assert_same(model, plain, **inputs_of(kind))
            kept.append((output, {k: v.clone() for k, v in output.items()}))
        for rows, columns in ((8, 38), (5, 1), (7, 31)):
            inputs = {"input_ids": ids_of(DEVICE, (rows, columns))}
            output = assert_same(model, plain, **inputs)
            kept.append((output, {k: v.clone() for k, v in output.items()}))
    assert count(model) == 1
    for output, then in kept:  # later calls leave them alone
        assert all(torch.equal(output[k], v) for k, v in then.items())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_pooler_may_have_sparse_weights():
    plain, model = pair()
    for m in (plain, model):
        dense = m.pooler.dense
        dense.weight = torch.nn.Parameter(dense.weight.detach().to_sparse_csr())
    with torch.no_grad():
        for _ in range(3):
            assert_same(model, plain, **inputs_of())
    assert count(model) == 1


def test_every_input_is_copied_in():
    plain, model = pair()
    generator = torch.manual_seed(3)
    with torch.no_grad():
        for _ in range(3):
            ids = torch.randint(99, (B, S), generator=generator).to(DEVICE)
            types = torch.randint(2, (B, S), generator=generator).to(DEVICE)
            positions = torch.randint(40, (1, S), generator=generator).to(DEVICE)
            assert_same(model, plain, input_ids=ids, token_type_ids=types)
            assert_same(model, plain, input_ids=ids, position_ids=positions)
            assert_same(model, plain, input_ids=ids.int())
            embeds = torch.randn(B, S, 64, generator=generator).to(DEVICE)
            assert_same(model, plain, inputs_embeds=embeds, attention_mask=masks(DEVICE)["holes"])
    assert count(model) == 4


@pytest.mark.parametrize("name, limit", [("LIMIT", 2), ("KEPT", 250)])  # buckets of 40, 80, 160
def test_a_graph_is_recorded_at_the_second_call_and_one_that_is_no_longer_used_makes_way(
    name, limit, monkeypatch
):
    monkeypatch.setattr(graphs, name, limit)
    monkeypatch.setattr(graphs, "STALE", 6)
    _, model = pair()

    def there(*sizes):
        with torch.no_grad():
            for rows in sizes:
                model(input_ids=ids_of(DEVICE, (rows, 3)))
        return [bucket.B for bucket in graphs_of(model)._graphs]

    assert there(1) == []
    assert there(1) == [1]
    assert there(2) == [1]
    assert there(2) == [1, 2]
    assert there(1, 4, 4, 1, 4) == [2, 1]  # all three recur: none is recorded again and again
    assert there(1, 4) == [1, 4]  # 2 has not for six calls


@pytest.mark.skipif(GPU, reason="waits for an event in place of the GPU's")
@pytest.mark.parametrize("what", ["restored", "turned off", "made way"])
def test_nothing_is_freed_before_the_last_replay_has_finished(what, monkeypatch):
    waited = []

    class Event:
        def synchronize(self):
            weights = [p.data_ptr() for p in model.parameters()]
            waited.append((graphs_of_model.count, weights))

    monkeypatch.setattr(graphs, "in_turn", lambda *_: contextlib.nullcontext(Event()))
    monkeypatch.setattr(graphs, "LIMIT", 1)
    monkeypatch.setattr(graphs, "STALE", 0)
    _, model = pair()
    graphs_of_model = graphs_of(model)
    with torch.no_grad():
        for _ in range(2):
            model(**inputs_of())
        before = graphs_of_model.count, [p.data_ptr() for p in model.parameters()]
        if what == "restored":
            bert_fast.restore(model)
        elif what == "turned off":
            bert_fast.accelerate(model, cuda_graphs=False)
        else:
            for _ in range(2):
                model(input_ids=ids_of(DEVICE, (1, 3)))
    assert waited == [before]


def moved(model):
    model.pooler.dense.weight.data = 2 * model.pooler.dense.weight.data


def written(model):
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)


def written_through_data(model):
    model.encoder.layer[0].attention.self.query.weight.data.mul_(2)


def another_parameter(model):
    norm = model.embeddings.LayerNorm
    norm.bias = torch.nn.Parameter(norm.bias.detach() + 1)


def another_module(model):
    dense = torch.nn.Linear(100, 64, device=DEVICE)
    with torch.no_grad():
        for p in dense.parameters():
            p.fill_(0.01)
    model.encoder.layer[1].output.dense = dense


def another_eps(model):
    model.encoder.layer[1].output.LayerNorm.eps = 0.5


def fewer_layers(model):
    del model.encoder.layer[1]


def halves(model):
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [moved, written, written_through_data, another_parameter, another_module, another_eps,
               fewer_layers, halves],
)  # fmt: skip
def test_a_model_that_changes_does_not_run_as_it_was(change):
    plain, model = pair()
    with torch.no_grad():
        for _ in range(3):
            before = assert_same(model, plain, **inputs_of())
        change(plain)
        change(model)
        for _ in range(3):
            after = assert_same(model, plain, **inputs_of())
    assert not torch.equal(before.pooler_output.to(after.pooler_output.dtype), after.pooler_output)
    assert count(model) == 1


def hook(model):
    model.encoder.layer[0].register_forward_hook(lambda m, args, output: output * 2)
    return "hooks, which the kernels would not run"


def many_dimensions(model):
    return "4-D attention_mask"


@pytest.mark.parametrize("change", [hook, many_dimensions])
def test_what_the_kernels_do_not_cover_runs_stock(change):
    plain, model = pair()
    inputs = inputs_of()
    with torch.no_grad():
        model(**inputs), model(**inputs)
        fast, _ = fast_calls(model)[0]
        for m in (plain, model):
            reason = change(m)
        if change is many_dimensions:
            inputs["attention_mask"] = torch.ones(B, 1, S, S, device=DEVICE)
        ours = model(**inputs).last_hidden_state
        assert torch.equal(ours, plain(**inputs).last_hidden_state)
    assert [(n, list(reasons)) for n, reasons in fast_calls(model)] == [
        (fast, [f"encoder.layer.0: {reason}" if change is hook else reason])
    ]


def test_dropout_is_drawn_anew_in_each_replay():
    _, model = pair()
    with torch.no_grad():
        for _ in range(3):
            evaluated = model(**inputs_of()).last_hidden_state
        model.train()
        drawn = [model(**inputs_of()).last_hidden_state for _ in range(4)]
        assert count(model) == 1
        model.eval()
        assert torch.equal(model(**inputs_of()).last_hidden_state, evaluated)
    assert not any(map(torch.equal, drawn, [*drawn[1:], evaluated]))


def test_a_call_that_cannot_be_meant_fails_as_ever():
    _, model = pair()
    with torch.no_grad():
        model(**inputs_of()), model(**inputs_of())
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(ids_of(DEVICE), attention_mask=torch.ones(B + 1, S, device=DEVICE))
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(attention_mask=torch.ones(B, S, device=DEVICE))
        for _ in range(2):
            model(inputs_embeds=torch.ones(B, S, 64, device=DEVICE))
        with pytest.raises(ValueError, match="inputs_embeds must be"):
            model(inputs_embeds=torch.ones(B, S, 1, device=DEVICE))


def test_calls_without_a_bucket():
    _, model = pair()
    ids, mask = ids_of(DEVICE), masks(DEVICE)["right"]
    given = Inputs(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        assert bucket_of(model, given, {})[:2] == (8, 40)
        assert bucket_of(model, given, {"output_hidden_states": True}) is None
        assert bucket_of(model, given._replace(attention_mask=mask[:, :-1]), {}) is None
        assert bucket_of(model, given._replace(token_type_ids=ids[:2]), {}) is None
        assert bucket_of(model, Inputs(input_ids=ids[:0]), {}) is None
        assert bucket_of(model, Inputs(input_ids=ids[:, :0]), {}) is None
        most = graphs.MAX_TOKENS // 8
        for length, bucket in ((most, (8, most)), (most + 1, None)):
            positions = ids.new_zeros(1, length)
            long = Inputs(input_ids=ids.new_zeros(8, length), position_ids=positions)
            found = bucket_of(model, long, {})
            assert (found and found[:2]) == bucket
            assert bucket_of(model, long._replace(position_ids=None), {}) is None
        with torch.autocast(DEVICE, torch.bfloat16):
            assert bucket_of(model, given, {}) is None
        decoder = bert_fast.accelerate(stock_model(is_decoder=True))
        assert bucket_of(decoder, given, {}) is None
    assert bucket_of(model, given, {}) is None  # with gradients


@pytest.mark.usefixtures("poisoned")  # where gradients are added up in an order that does not vary
def test_gradients_are_as_without():
    plain, model = pair()
    with torch.no_grad():
        model(**inputs_of()), model(**inputs_of())
    for m in (plain, model):
        m(**inputs_of()).pooler_output.sum().backward()
    for p, q in zip(plain.parameters(), model.parameters()):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_graph_recorded_in_inference_mode_serves_others(mode):
    plain, model = pair()
    other = torch.inference_mode if mode is torch.no_grad else torch.no_grad
    with mode():
        for _ in range(3):
            assert_same(model, plain, **inputs_of())
    with other():
        assert_same(model, plain, **inputs_of("left"))
    assert count(model) == 1


def fails(error):
    def record(*_):
        raise error

    return record


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("no 2 GiB")], ids=str
)
def test_where_recording_fails_the_call_does_not(error, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "_record", fails(error))
    plain, model = pair()
    ours = graphs_of(model)
    with torch.no_grad():
        for call in range(8):
            assert_same(model, plain, **inputs_of())
            if "permitted" in str(error):  # may be over: a thread waited for the device
                assert (ours.off is None) == (call < 5)
    assert caplog.text.count("CUDA graphs are off") == 1
    why = f"{type(error).__name__} while recording, {error}"
    assert f"    0 CUDA graphs, off: {why}" in str(bert_fast.report(model))


def test_out_of_memory_beside_graphs_drops_them_and_tries_again(monkeypatch, caplog):
    plain, model = pair()
    run = type(model)._run_on_kernels

    def run_once_memory_is_free(self, inputs, kwargs):
        if inputs.input_ids.shape[1] == 40 and count(model):
            raise torch.OutOfMemoryError("no 2 GiB")
        return run(self, inputs, kwargs)

    with torch.no_grad():
        for _ in range(2):
            assert_same(model, plain, **inputs_of())
        assert count(model) == 1
        monkeypatch.setattr(graphs, "MAX_TOKENS", 64)
        monkeypatch.setattr(type(model), "_run_on_kernels", run_once_memory_is_free)
        assert_same(model, plain, input_ids=ids_of(DEVICE, (B, 40)))
    assert count(model) == 0 and "out of memory, no 2 GiB" in caplog.text
    monkeypatch.setattr(type(model), "_run_on_kernels", fails(torch.OutOfMemoryError("no 3 GiB")))
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="no 3 GiB"):
        model(**inputs_of())


def test_threads_take_turns():
    plain, model = pair()
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(10):
                rows, columns = torch.randint(1, 9, (2,), generator=generator).tolist()
                ids = torch.randint(99, (rows, columns), generator=generator).to(DEVICE)
                ours, theirs = model(ids).last_hidden_state, plain(ids).last_hidden_state
                if not torch.equal(ours, theirs):
                    wrong.append((seed, rows, columns))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and count(model) > 1
    assert fast_calls(model) == [(80, {})]


def test_copies_and_files_start_without_and_a_restored_model_keeps_none():
    _, model = pair()
    with torch.no_grad():
        model(**inputs_of()), model(**inputs_of())
    assert "    1 CUDA graphs" in str(bert_fast.report(model))
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert graphs_of(other) is not None and graphs_of(other).count == 0
    assert not any("graph" in name for name in model.state_dict())
    held = weakref.ref(graphs_of(model))
    bert_fast.restore(model)
    gc.collect()
    assert held() is None and not any("graph" in name for name in vars(model))


def test_to_another_place_frees_them():
    _, model = pair("BertForSequenceClassification")
    with torch.no_grad():
        model(**inputs_of()), model(**inputs_of())
    assert count(model) == 1
    assert model.to(DEVICE).eval() is model  # as some do before each call
    assert count(model) == 1
    model.to(torch.float64)
    assert count(model) == 0


def test_an_embedding_of_other_ids_is_never_read_from_an_old_table():
    """Where an id is outside of it, a kernel stops, and with it all that the process has there."""
    plain, model = pair()
    ids = ids_of(DEVICE)
    with torch.no_grad():
        model(ids), model(ids)
        recorded = graphs_of(model)
        for m in (plain, model):
            torch.manual_seed(0)
            m.resize_token_embeddings(120)
        ids[0, 0] = 119
        assert recorded.replay(bucket_of(model, Inputs(input_ids=ids), {}), None) is None
        for _ in range(3):
            assert_same(model, plain, input_ids=ids)
        model.embeddings.token_type_embeddings = torch.nn.Identity()
        assert bucket_of(model, Inputs(input_ids=ids), {}) is None


def test_what_is_recorded_after_weights_have_moved_is_kept():
    plain, model = pair()
    with torch.no_grad():
        model(**inputs_of())
        plain.bfloat16(), model.bfloat16()  # weights stand apart again, till the next forward
        kept = []
        for _ in range(4):
            assert_same(model, plain, **inputs_of())
            kept.append(list(graphs_of(model)._graphs.values()))
    assert kept[1] == kept[2] == kept[3] and len(kept[3]) == 1


def test_what_was_played_before_others_recorded_anew_is_not_taken():
    plain, model = pair()
    given = Inputs(**inputs_of())
    with torch.no_grad():
        model(**inputs_of()), model(**inputs_of())
        held, bucket = graphs_of(model), bucket_of(model, given, {})
        old = held.replay(bucket, given)
        assert held.result(model, bucket, given, old) is old.last
        for m in (plain, model):
            another_parameter(m)
        for _ in range(2):  # other threads: the first drops the graphs, the next records
            assert_same(model, plain, **inputs_of())
        assert held.count == 1 and held.result(model, bucket, given, old) is None


def test_graphs_that_are_off_as_recording_failed_may_be_tried_again(monkeypatch, caplog):
    _, model = pair()
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(graphs, "_record", fails(torch.OutOfMemoryError("no 2 GiB")))
        model(**inputs_of()), model(**inputs_of())
    assert graphs_of(model).off
    bert_fast.accelerate(model, cuda_graphs=True)
    with torch.no_grad():
        model(**inputs_of()), model(**inputs_of())
    assert count(model) == 1 and "already" not in caplog.text


def test_graphs_stand_beside_torchs_switch_for_tf32():
    _, model = pair()
    given = Inputs(**inputs_of())
    with torch.no_grad():
        without = bucket_of(model, given, {})
        torch.backends.fp32_precision = "tf32"
        try:
            assert bucket_of(model, given, {}) == without._replace(fp32_precision="tf32")
        finally:
            torch.backends.fp32_precision = "none"


def test_accelerate_turns_them_on_and_off(caplog):
    model = bert_fast.accelerate(stock_model(device=DEVICE))
    assert bert_fast.report(model).swapped[0].cuda_graphs == 0
    assert bert_fast.accelerate(model, cuda_graphs=False) is model
    assert graphs_of(model) is None
    assert bert_fast.report(model).swapped[0].cuda_graphs is None
    bert_fast.accelerate(model, frozen=True)
    assert graphs_of(model) is None  # as it was
    bert_fast.accelerate(model, cuda_graphs=True)
    assert graphs_of(model) is not None and "already" not in caplog.text
    bert_fast.accelerate(model)
    assert "already accelerated" in caplog.text


def test_a_class_that_is_loaded_has_them(tmp_path):
    stock_model(device=DEVICE).save_pretrained(tmp_path)
    model = bert_fast.BertModel.from_pretrained(tmp_path).to(DEVICE)
    with torch.no_grad():
        model(**inputs_of()), model(**inputs_of())
    assert count(model) == 1


@pytest.mark.skipif(not GPU, reason="only a GPU has streams")
def test_calls_in_several_streams():
    plain, model = pair()
    streams = [torch.cuda.Stream() for _ in range(4)]
    pairs = []
    with torch.no_grad():
        model(**inputs_of()), model(**inputs_of())
        torch.cuda.synchronize()
        for n in range(40):
            with torch.cuda.stream(streams[n % 4]):
                ids = ids_of(DEVICE, (B, 1 + n % S))
                pairs.append((model(ids).last_hidden_state, plain(ids).last_hidden_state))
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in pairs)


def turned(model):
    weight = model.encoder.layer[0].attention.self.query.weight
    weight.data = weight.data.t()


def turned_in_place(model):
    model.encoder.layer[0].attention.self.query.weight.t_()


def repeated(model):
    bias = model.encoder.layer[0].output.LayerNorm.bias
    bias.data = bias.data[:1].expand(64)


def other_heads(model):
    model.config.num_attention_heads = 2
    for layer in model.encoder.layer:
        layer.attention.self.num_attention_heads = 2
        layer.attention.self.attention_head_size = 32


def weight_beside(model):
    """As a hypernetwork puts it, a tensor that is no parameter."""
    dense = model.encoder.layer[0].output.dense
    weight = dense.weight.detach() * 2
    del dense.weight
    dense.weight = weight


@pytest.mark.parametrize("change", [turned, turned_in_place, repeated, other_heads, weight_beside])
def test_a_model_whose_numbers_lie_otherwise_is_recorded_anew(change):
    plain, model = pair()
    with torch.no_grad():
        for _ in range(3):
            before = model(**inputs_of())[0]
        assert count(model) == 1
        for m in (plain, model):
            change(m)
        after = assert_same(model, plain, **inputs_of())[0]
        assert not torch.equal(before, after)
        if change is weight_beside:  # and once more, which is noticed as well
            for _ in range(3):
                assert_same(model, plain, **inputs_of())
            assert count(model) == 1
            for m in (plain, model):
                m.encoder.layer[0].output.dense.weight = torch.ones(64, 100, device=DEVICE)
            for _ in range(3):
                assert_same(model, plain, **inputs_of())


def test_a_call_draws_what_it_would_draw_without_a_graph_also_where_it_is_recorded():
    _, model = pair()
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3
    found, after = [], []
    with torch.no_grad():
        for _ in range(4):  # the second is recorded
            torch.manual_seed(7)
            found.append(model(**inputs_of())[0])
            after.append(torch.rand(3, device=DEVICE))
    assert count(model) == 1
    assert all(torch.equal(a, after[0]) for a in after)
    assert all(torch.equal(f, found[0]) for f in found)


def test_nothing_is_replayed_for_calls_that_stock_serves(monkeypatch):
    _, model = pair(attn_implementation="eager")
    replays = []
    run = graphs.Graph.run
    monkeypatch.setattr(
        graphs.Graph, "run", lambda self, inputs: replays.append(1) or run(self, inputs)
    )
    with torch.no_grad():
        for _ in range(3):
            model(**inputs_of())
        assert len(replays) == 2
        model(**inputs_of(), output_attentions=True)
        assert len(replays) == 2
        hook = model.encoder.layer[0].register_forward_hook(lambda *_: None)
        for _ in range(3):
            model(**inputs_of())
        assert len(replays) == 3, "the first one with the hook"
        hook.remove()
        for _ in range(3):
            model(**inputs_of())
        assert len(replays) == 5, "the first one without it is not known to be covered"
    assert count(model) == 1


class OutOfResources(Exception):
    """Triton's is no RuntimeError either."""


def test_whatever_stops_a_recording_the_call_goes_on(monkeypatch):
    plain, model = pair()

    def record(*_):
        raise OutOfResources("shared memory")

    monkeypatch.setattr(graphs, "_record", record)
    with torch.no_grad():
        for _ in range(2 * graphs.ATTEMPTS):
            assert_same(model, plain, **inputs_of())
    assert graphs_of(model).off.startswith("OutOfResources while recording, shared memory")


@pytest.mark.skipif(not GPU, reason="only a capture of CUDA's can be broken")
def test_after_a_broken_capture_all_goes_on(monkeypatch):
    """torch leaves its allocator and its generator in the state of a capture."""
    plain, model = pair()
    encode = type(model)._encode

    def waits(self, *args, **kwargs):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return encode(self, *args, **kwargs)

    with torch.no_grad():
        monkeypatch.setattr(type(model), "_encode", waits)
        for _ in range(2 * graphs.ATTEMPTS):
            assert_same(model, plain, **inputs_of())
        assert graphs_of(model).off
        torch.cuda.empty_cache()
        torch.randn(3, device=DEVICE)
        monkeypatch.undo()
        bert_fast.accelerate(model, cuda_graphs=True)
        for _ in range(3):
            assert_same(model, plain, **inputs_of())
        assert count(model) == 1


@pytest.mark.filterwarnings("error:Accessing the data pointer")
def test_a_model_of_fake_tensors_runs_stock_as_ever():
    with FakeTensorMode(), torch.device(DEVICE):
        model = bert_fast.accelerate(transformers.BertModel(config_of()).eval())
        with torch.no_grad():
            for _ in range(3):
                last = model(input_ids=torch.ones(B, S, dtype=torch.long))[0]
    assert last.shape == (B, S, 64)
    assert count(model) == 0
