"""CUDA graphs of training: a step that is replayed is the step that is not.

On a GPU these are graphs; without one the stand-in of test_graphs.py records and replays.
"""

import contextlib
import copy
import gc
import io

import pytest
import torch
from models import B, fast_calls, ids_of, masks
from test_graphs import DEVICE, GPU, Recording, a_stand_in, count, encoder_of, inputs_of, pair

import bert_fast
from bert_fast import graphs, modeling, training_graphs
from bert_fast.training_graphs import training_graphs_of

assert a_stand_in  # a fixture, used by every test here too
replayed = []


def _counted(name, replay):
    return lambda: replayed.append(name) or replay()


def record_steps(forward, backward, pool, device):
    with Recording() as of_forward:
        last = forward()
    with Recording() as of_backward:
        backward(last)
    return of_forward.replay, of_backward.replay, last


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """The stand-in, and what was replayed in `replayed`."""
    record = training_graphs._record if GPU else record_steps

    def record_and_count(*args):
        forward, backward, last = record(*args)
        return _counted("forward", forward), _counted("backward", backward), last

    monkeypatch.setattr(training_graphs, "_record", record_and_count)
    replayed.clear()


def trained_pair(name="BertModel", dropout=0.0, **changes):
    """A model without graphs, and the same with those of training."""
    plain, model = pair(name, **changes)
    bert_fast.accelerate(model, training_graphs=True)
    for m in (plain, model):
        m.train()
        for part in m.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = dropout
    return plain, model


def step(model, seed=0, **inputs):
    """Outputs and gradients of a step."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model(**inputs).to_tuple()
    sum(t.float().square().mean() for t in outputs).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], grads


def assert_same_step(model, plain, seed=0, **inputs):
    ours, grads = step(model, seed, **inputs)
    theirs, expected = step(plain, seed, **inputs)
    assert all(map(torch.equal, ours, theirs))
    assert_same_gradients(grads, expected)


def assert_same_gradients(grads, expected):
    """Where rows are known on the host, other products give them."""
    assert grads.keys() == expected.keys()
    largest = max(d.abs().max().item() for d in expected.values())
    for name, grad in expected.items():
        rough = 1e-6 if grad.dtype == torch.float32 else 1e-2
        assert grads[name].dtype == grad.dtype
        torch.testing.assert_close(grads[name], grad, rtol=10 * rough, atol=rough * largest)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "name", ["BertModel", "RobertaModel", "ElectraModel", "DistilBertModel"]
)
def test_any_mask_and_length_in_a_bucket_gives_the_same_step(name, dropout):
    plain, model = trained_pair(name, dropout)
    for seed, kind in enumerate(masks()):
        assert_same_step(model, plain, seed, **inputs_of(kind))
    for rows, columns in ((8, 38), (5, 1), (7, 31)):
        assert_same_step(model, plain, input_ids=ids_of(DEVICE, (rows, columns)))
    assert training_graphs_of(model).count == 1
    steps = len(masks()) + 2  # the first but one recorded it
    assert replayed == ["forward", "backward"] * steps
    assert fast_calls(model) == [(steps + 1, {})]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    plain, model = (m.to(dtype) for m in trained_pair())
    for kind in ("right", "holes", "left"):
        assert_same_step(model, plain, **inputs_of(kind))
    assert len(replayed) == 4


def test_autocast_has_graphs_of_its_own():
    plain, model = trained_pair(dropout=0.1)
    for _ in range(3):
        with torch.autocast(DEVICE, torch.bfloat16):
            ours, theirs = step(model, **inputs_of()), step(plain, **inputs_of())
        assert torch.equal(ours[0][0], theirs[0][0])
        for name, grad in theirs[1].items():  # in fp32, of products in bf16
            assert ours[1][name].dtype == torch.float32
            torch.testing.assert_close(ours[1][name], grad, rtol=0.02, atol=1e-4)
        assert_same_step(model, plain, **inputs_of())
    assert training_graphs_of(model).count == 2 and len(replayed) == 8


def test_a_head_a_loss_and_an_optimizer():
    plain, model = trained_pair("BertForSequenceClassification", dropout=0.2)
    labels = torch.arange(B, device=DEVICE) % 2
    found = []
    for m in (plain, model):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        for kind in ("right", "holes", "left", "none", "right"):
            loss = m(**inputs_of(kind), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
        found.append((loss.detach(), dict(m.named_parameters())))
    assert replayed == ["forward", "backward"] * 4
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    for name, p in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], p, rtol=1e-3, atol=1e-5)


def test_what_is_recorded_comes_to_no_parameter(monkeypatch):
    """autograd would make the stream of the recording wait for that of an output before it."""
    _, model = trained_pair()
    kept, found = [model(**inputs_of()).last_hidden_state.sum()], []
    record = training_graphs._record

    def look_and_record(forward, backward, *others):
        output = forward()  # kept, or torch 2.11 frees its node
        nodes = [output.grad_fn]
        for node in nodes:
            nodes += [n for n, _ in node.next_functions if n is not None and n not in nodes]
            found.extend([node.variable] if hasattr(node, "variable") else [])
        return record(forward, backward, *others)

    monkeypatch.setattr(training_graphs, "_record", look_and_record)
    kept += step(model, **inputs_of())
    assert training_graphs_of(model).count == 1 and len(found) > 30
    parameters = {p.data_ptr(): p for p in model.parameters()}
    assert not any(leaf is parameters[leaf.data_ptr()] for leaf in found)


def share_a_layer(model):
    model.encoder.layer[1] = model.encoder.layer[0]


def share_a_weight(model):
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight


@pytest.mark.parametrize("share", [share_a_layer, share_a_weight])
def test_what_is_in_two_places_of_a_model_stays_a_parameter_and_gets_both_gradients(share):
    plain, model = trained_pair()
    share(plain), share(model)
    parameters = list(model.parameters())
    for _ in range(3):
        assert_same_step(model, plain, **inputs_of())
    assert replayed == ["forward", "backward"] * 2
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


def test_a_model_keeps_its_parameters_while_it_is_recorded(monkeypatch):
    """Another thread may be in the middle of a forward, whose gradients would be lost."""
    _, model = trained_pair()
    parameters = list(model.parameters())
    found, embed = [], modeling.embed
    monkeypatch.setattr(
        modeling, "embed", lambda *args: found.append(list(model.parameters())) or embed(*args)
    )
    step(model, **inputs_of()), step(model, **inputs_of())
    assert replayed and len(found) > 1
    assert all(p is q for now in found for p, q in zip(now, parameters, strict=True))


def test_gradients_of_several_steps_add_up_and_stay():
    _, model = trained_pair()
    step(model, **inputs_of())
    _, once = step(model, **inputs_of())
    kept = {name: grad.clone() for name, grad in once.items()}
    model.zero_grad()
    for _ in range(2):
        model(**inputs_of()).last_hidden_state.sum().backward()
    for name, grad in once.items():
        assert torch.equal(grad, kept[name]), name
    twice = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**inputs_of()).last_hidden_state.sum().backward()
    for name, grad in twice.items():
        torch.testing.assert_close(grad, 2 * model.get_parameter(name).grad)
    model.get_parameter("encoder.layer.0.attention.self.query.weight").grad.zero_()
    assert model.get_parameter("encoder.layer.0.attention.self.key.weight").grad.any()


def test_two_forwards_before_a_backward():
    """As of two texts that are compared: the second runs without a graph."""
    plain, model = trained_pair()
    found = []
    for m in (plain, model):
        for _ in range(3):
            m.zero_grad()
            first, second = (m(**inputs_of(kind))[0][:, 0] for kind in ("right", "left"))
            (first @ second.mT).logsumexp(1).sum().backward()
        found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert replayed == ["forward", "backward"] * 3  # the second call ever recorded it
    assert_same_gradients(found[1], found[0])


def test_an_output_that_is_kept_is_not_written_over():
    plain, model = trained_pair()
    step(model, **inputs_of())
    kept = model(**inputs_of("left")).last_hidden_state
    value = kept.detach().clone()
    for kind in ("right", "holes"):
        assert_same_step(model, plain, **inputs_of(kind))
    assert replayed == ["forward"]
    assert torch.equal(kept, value)
    model.zero_grad(), plain.zero_grad()
    kept.square().mean().backward()
    plain(**inputs_of("left")).last_hidden_state.square().mean().backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None}
                    for m in (model, plain))  # fmt: skip
    assert_same_gradients(ours, theirs)
    assert_same_step(model, plain, **inputs_of("holes"))
    assert replayed == ["forward", "backward"] * 2


def test_a_backward_that_keeps_its_graph_may_run_again():
    _, model = trained_pair()
    step(model, **inputs_of())
    weight = model.encoder.layer[0].output.dense.weight
    model.zero_grad()
    loss = model(**inputs_of()).last_hidden_state.square().mean()
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    model(**inputs_of("left"))  # without a graph
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)
    assert replayed == ["forward", "backward", "backward"]
    with pytest.raises(RuntimeError, match="backward"):
        loss.backward()


def test_a_backward_after_what_it_needs_is_gone_is_an_error():
    _, model = trained_pair()
    step(model, **inputs_of())
    last = model(**inputs_of()).last_hidden_state
    parameters = [p for n, p in model.named_parameters() if not n.startswith("pooler")]
    torch.autograd.grad(last.sum(), parameters)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(last.sum(), parameters)
    last = model(**inputs_of()).last_hidden_state
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    with pytest.raises(RuntimeError, match="step the optimizer after the backward"):
        last.sum().backward()


def test_a_frozen_weight_that_is_written_to_before_the_backward_is_an_error():
    """As in stock: gradients of layers below are computed from it."""
    _, model = trained_pair()
    weight = model.encoder.layer[1].output.dense.weight.requires_grad_(False)
    step(model, **inputs_of()), step(model, **inputs_of())
    last = model(**inputs_of()).last_hidden_state
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="a weight has been written to"):
        last.sum().backward()
    assert replayed == ["forward", "backward", "forward"]


def test_a_second_derivative_is_an_error():
    _, model = trained_pair()
    step(model, **inputs_of())
    last = model(**inputs_of()).last_hidden_state
    weight = model.encoder.layer[0].output.dense.weight
    (grad,) = torch.autograd.grad(last.square().sum(), weight, create_graph=True)
    assert "backward" in replayed
    with pytest.raises(RuntimeError, match="a second derivative is asked for"):
        grad.sum().backward()


def test_what_is_frozen_gets_no_gradient_and_graphs_that_train_others_go():
    plain, model = trained_pair()
    for m in (plain, model):
        m.embeddings.requires_grad_(False)
        m.encoder.layer[1].output.dense.weight.requires_grad_(False)
    for _ in range(3):
        assert_same_step(model, plain, **inputs_of())
    assert replayed == ["forward", "backward"] * 2
    for m in (plain, model):
        m.embeddings.requires_grad_(True)
    for _ in range(3):
        assert_same_step(model, plain, **inputs_of())
    assert replayed == ["forward", "backward"] * 4
    model.requires_grad_(False)
    assert not model(**inputs_of()).last_hidden_state.requires_grad
    assert len(replayed) == 8 and training_graphs_of(model).count == 0


def test_inference_has_its_own_and_neither_drops_the_other():
    plain, model = trained_pair(dropout=0.2)
    for _ in range(3):
        assert_same_step(model, plain, **inputs_of())
        model.eval(), plain.eval()
        with torch.no_grad():
            for kind in ("left", "right"):
                ours, theirs = (m(**inputs_of(kind)).last_hidden_state for m in (model, plain))
                assert torch.equal(ours, theirs)
        model.train(), plain.train()
    assert replayed == ["forward", "backward"] * 2
    assert count(model) == 1 and training_graphs_of(model).count == 1


def moved(model):
    weight = model.encoder.layer[0].output.dense.weight
    weight.data = 2 * weight.data


def another_parameter(model):
    norm = model.embeddings.LayerNorm
    norm.bias = torch.nn.Parameter(norm.bias.detach() + 1)


def another_dropout(model):
    model.encoder.layer[1].output.dropout.p = 0.5


def evaluated(model):
    model.eval()


@pytest.mark.parametrize("change", [moved, another_parameter, another_dropout, evaluated])
def test_a_model_that_changes_does_not_run_as_it_was(change):
    plain, model = trained_pair(dropout=0.2)
    for _ in range(3):
        assert_same_step(model, plain, **inputs_of())
    change(plain), change(model)
    replays = len(replayed)
    for _ in range(3):
        assert_same_step(model, plain, **inputs_of())
    assert training_graphs_of(model).count == 1
    assert len(replayed) > replays


def checkpointing(model, inputs):
    model.gradient_checkpointing_enable()
    return contextlib.nullcontext()


def embeddings_given(model, inputs):
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.embeddings.word_embeddings(ids).detach()
    return contextlib.nullcontext()


def a_hook_on_embeddings(model, inputs):
    model.enable_input_require_grads()
    return contextlib.nullcontext()


def anomalies(model, inputs):
    return torch.autograd.detect_anomaly(check_nan=False)


def a_process_group(model, inputs):
    @contextlib.contextmanager
    def group():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        yield
        torch.distributed.destroy_process_group()

    return group()


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize(
    "change", [checkpointing, embeddings_given, a_hook_on_embeddings, anomalies,
               a_process_group],
)  # fmt: skip
def test_calls_that_are_not_recorded(change):
    plain, model = trained_pair()
    step(model, **inputs_of())
    found = []
    for m in (plain, model):
        inputs = inputs_of()
        with change(m, inputs):
            found += [step(m, **inputs)[1] for _ in range(2)]
    assert not replayed and training_graphs_of(model).count == 0
    assert_same_gradients(found[3], found[1])


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("no 2 GiB")], ids=str
)
def test_where_recording_fails_the_step_does_not(error, monkeypatch, caplog):
    def fail(*_):
        raise error

    monkeypatch.setattr(training_graphs, "_record", fail)
    plain, model = trained_pair()
    for _ in range(8):
        assert_same_step(model, plain, **inputs_of())
    assert caplog.text.count("CUDA graphs are off") == 1
    why = f"{type(error).__name__} while recording, {error}"
    assert f"    0 CUDA graphs of training, off: {why}" in str(bert_fast.report(model))


def test_out_of_memory_in_a_replay_drops_them(monkeypatch, caplog):
    plain, model = trained_pair()
    for _ in range(2):
        assert_same_step(model, plain, **inputs_of())

    def run(*_):
        raise torch.OutOfMemoryError("no 2 GiB")

    monkeypatch.setattr(training_graphs._Graph, "run", run)
    assert_same_step(model, plain, **inputs_of())
    assert training_graphs_of(model).count == 0 and "out of memory, no 2 GiB" in caplog.text


def test_they_are_turned_on_and_off_and_told_of(caplog):
    _, model = pair()
    assert training_graphs_of(model) is None
    assert bert_fast.report(model).swapped[0].training_graphs is None
    bert_fast.accelerate(model, training_graphs=True)
    step(model, **inputs_of()), step(model, **inputs_of())
    assert "    1 CUDA graphs of training" in str(bert_fast.report(model))
    bert_fast.accelerate(model)
    assert training_graphs_of(model).count == 1  # as it was
    assert "already accelerated" in caplog.text
    bert_fast.accelerate(model, training_graphs=False)
    assert training_graphs_of(model) is None
    step(model, **inputs_of())
    assert replayed == ["forward", "backward"]


def test_copies_and_files_have_none_yet_and_a_restored_model_keeps_nothing():
    _, model = trained_pair()
    step(model, **inputs_of()), step(model, **inputs_of())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert training_graphs_of(other).count == 0
        step(other, **inputs_of()), step(other, **inputs_of())
        assert training_graphs_of(other).count == 1
    last = model(**inputs_of()).last_hidden_state
    bert_fast.restore(model)
    gc.collect()
    last.sum().backward()  # of what was replayed before
    assert not any("graph" in name for name in vars(model))
    assert model.encoder.layer[0].output.dense.weight.grad.any()


def test_encoders_inside_another_module():
    plain, model = (torch.nn.ModuleDict({"text": m}) for m in trained_pair())
    for _ in range(2):
        step(model["text"], **inputs_of())
    assert training_graphs_of(encoder_of(model)).count == 1
    bert_fast.accelerate(plain, training_graphs=True)
    assert training_graphs_of(encoder_of(plain)).count == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_steps_that_torch_checkpoints_run_without_a_graph(use_reentrant):
    plain, model = trained_pair()
    step(model, **inputs_of())
    step(model, **inputs_of())
    assert replayed
    replayed.clear()

    def gradients(m):
        m.zero_grad()
        run = lambda scale: scale * m(**inputs_of())[0]  # noqa: E731
        scale = torch.ones((), device=DEVICE, requires_grad=True)
        last = torch.utils.checkpoint.checkpoint(run, scale, use_reentrant=use_reentrant)
        last.square().sum().backward()
        return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

    assert_same_gradients(gradients(model), gradients(plain))
    assert not replayed


def test_replicas_of_data_parallel_run_without_a_graph():
    plain, model = trained_pair()

    def replica_of(module):  # as torch.nn.parallel.replicate makes it
        replica = module._replicate_for_data_parallel()
        replica._modules = {name: replica_of(m) for name, m in module._modules.items()}
        for name, p in module._parameters.items():
            setattr(replica, name, p.view_as(p))
        return replica

    last = replica_of(model)(**inputs_of())[0]
    assert torch.equal(last, plain(**inputs_of())[0])
    last.square().sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad.any()


def test_hooks_see_gradients_of_what_has_one_alone():
    _, model = trained_pair()
    seen = set()
    for name, p in model.named_parameters():
        p.register_hook(lambda grad, name=name: seen.add(name) or grad.clamp(-1, 1))
    for _ in range(3):
        seen.clear()
        model(**inputs_of())[0].square().sum().backward()
    assert "backward" in replayed
    assert seen == {n for n, _ in model.named_parameters() if not n.startswith("pooler")}


def test_a_pooler_may_be_trained_before_the_encoder():
    plain, model = trained_pair()
    for m in (plain, model):
        m.requires_grad_(False)
        m.pooler.requires_grad_(True)
    for _ in range(2 * graphs.ATTEMPTS):
        assert_same_step(model, plain, **inputs_of())
    assert not replayed and not training_graphs_of(model).off
    for m in (plain, model):
        m.encoder.layer[1].requires_grad_(True)
    for _ in range(3):
        assert_same_step(model, plain, **inputs_of())
    assert replayed


def test_deterministic_algorithms_have_graphs_of_their_own():
    _, model = trained_pair()
    for _ in range(2):
        step(model, **inputs_of())
    assert training_graphs_of(model).count == 1
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for _ in range(2):
            step(model, **inputs_of())
    finally:
        torch.use_deterministic_algorithms(False)
    assert training_graphs_of(model).count == 2


def test_weights_moved_before_the_backward_leave_theirs_to_it():
    """It reads what the forward read, wherever the weights are since."""
    plain, model = trained_pair()
    step(model, **inputs_of())
    _, expected = step(plain, **inputs_of())
    torch.manual_seed(0)
    model.zero_grad()
    last, pooled = model(**inputs_of()).to_tuple()
    assert replayed
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.data = torch.full_like(p, torch.nan)
    training_graphs_of(model).drop()
    gc.collect()
    (last.float().square().mean() + pooled.float().square().mean()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(grads, expected)
