"""The cheap form against the plain one: forward, every gradient, twenty steps; and that it stays cheap."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from apm.student import matmul as precision
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.model import APM, draw_parameters, parameter_shapes
from apm.student.position import grid_locations
from tests.counters import Allocations

# Small enough for processors that emulate bf16 products, large enough that matrices outweigh vectors
REDUCED = replace(APMConfig.preset("small", dim=64), image_size=112, hidden=(512, 256, 128))
LR = 1e-3  # larger than the default, so that twenty steps of a small student go somewhere


def random_config(seed: int, readout: str) -> APMConfig:
    """Sizes that are not the default ones nor each other's multiples."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 4, 5]))
    patch = int(rng.integers(2, 6))
    hidden = rng.integers(9, 50, size=3).tolist()
    return APMConfig(
        dim=4 * heads * int(rng.integers(1, 6)),
        image_size=patch * int(rng.integers(2, 8)),
        patch_size=patch,
        position_dim=4 * int(rng.integers(1, 9)),
        hidden=(hidden[0], hidden[1], hidden[2]),
        heads=heads,
        rgb_hidden=4,
        init_std=0.15,
        readout=readout,  # type: ignore[arg-type]
    )


def draw(config: APMConfig, count: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights, images and targets."""
    rng = np.random.default_rng(seed)
    parameters = draw_parameters(config, rng)
    images = torch.from_numpy(rng.standard_normal((count, 3, config.image_size, config.image_size)).astype(np.float32))
    return parameters, images, torch.from_numpy(rng.standard_normal((count, config.dim)).astype(np.float32))


def plain(config: APMConfig, parameters: dict[str, Tensor]) -> APM:
    model = APM(config)
    model.load_state_dict({name: value.clone() for name, value in parameters.items()})
    return model


def plain_loss(token: Tensor, target: Tensor, loss: str) -> Tensor:
    if loss == "mse":
        return (token - target).square().mean()
    return 1 - torch.cosine_similarity(token, target, dim=0)


def apart(got: Tensor, expected: Tensor) -> float:
    """Distance relative to the expected length."""
    return float(((got - expected).norm() / expected.norm()).detach())


# Gradients that are small differences of large terms: through the softmax, and one number summed over the whole column
CANCELLING = 5e-5


def cancels(name: str) -> bool:
    return name.startswith(("readout.query", "readout.attention.in_proj", "column.filter.bias"))


CASES = [(seed, readout, loss) for seed in range(3) for readout in ("query", "mean") for loss in ("mse", "cosine")]


def idle_where_autograd_is(engine: Engine, model: torch.nn.Module, b: int, *, within: float = 5e-6) -> set[str]:
    """Hold sample ``b``'s gradients to those of the plain form; returns the parameters that nothing moves in either."""
    dim, idle = engine.config.dim, set()
    for name, gradient in engine.gradients.items():
        expected = model.get_parameter(name).grad
        if expected is None or not expected.any():
            assert not gradient[b].any(), name
            idle.add(name)
            continue
        if name.endswith("in_proj_bias"):  # its middle third, the keys' bias, has no gradient but rounding
            expected = torch.cat((expected[:dim], torch.zeros(dim), expected[2 * dim :]))
        assert apart(gradient[b], expected) < (CANCELLING if cancels(name) else within), name
    return idle


@pytest.fixture(params=[True, False], ids=["one-by-one", "batched"])
def batching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the products both as a CPU and as a GPU takes them."""
    monkeypatch.setattr(precision, "_one_by_one", lambda _: request.param)


@pytest.mark.usefixtures("batching")
@pytest.mark.parametrize(("seed", "readout", "loss"), CASES)
def test_forward_and_every_gradient(seed: int, readout: str, loss: str) -> None:
    config = random_config(seed, readout)
    parameters, images, targets = draw(config, 3, seed)
    engine = Engine(config, parameters, batch=3, loss=loss)  # type: ignore[arg-type]
    engine.load(images, targets)
    engine.evaluate()
    engine.backward()
    assert set(engine.gradients) == {name for name in parameters if not name.startswith("rgb_head.")}
    for b in range(3):
        model = plain(config, parameters).double()  # so that all the rounding seen is the engine's
        target = targets[b].double()
        token = model(images[b : b + 1].double())[0]
        value = plain_loss(token, target, loss)
        value.backward()
        assert apart(engine.token[b], token) < 2e-6
        assert float(engine.loss[b]) == pytest.approx(value.item(), rel=2e-6, abs=1e-7)
        assert float(engine.cosine[b]) == pytest.approx(torch.cosine_similarity(token, target, dim=0).item(), abs=2e-6)
        assert not idle_where_autograd_is(engine, model, b)


@pytest.mark.parametrize(("seed", "readout", "loss"), CASES)
def test_twenty_steps(seed: int, readout: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_config(seed + 10, readout)
    parameters, images, targets = draw(config, 2, seed)
    rows, cols = grid_locations(config.grid)
    losses, tokens, fields = torch.empty(2, 20), torch.empty(2, 21, config.dim), []  # of the plain form
    for b in range(2):
        model = plain(config, parameters)
        adam = torch.optim.Adam(model.parameters(), lr=LR)
        for step in range(20):
            adam.zero_grad()
            token = model(images[b : b + 1])[0]
            value = plain_loss(token, targets[b], loss)
            value.backward()
            adam.step()
            losses[b, step], tokens[b, step] = value.item(), token.detach()
        with torch.no_grad():
            tokens[b, 20] = model(images[b : b + 1])[0]
            fields.append(model.field(images[b : b + 1], rows + 0.25, cols)[0])
    for one_by_one in (True, False):  # as a CPU and as a GPU takes the products
        monkeypatch.setattr(precision, "_one_by_one", lambda _, chosen=one_by_one: chosen)
        engine = Engine(config, parameters, batch=2, lr=LR, loss=loss)  # type: ignore[arg-type]
        engine.load(images, targets)
        history = engine.run(20, record_tokens=True)
        assert history.tokens is not None
        assert engine.updates.tolist() == [20.0] * 2
        read = engine.fold(2).features(rows + 0.25, cols)
        for b in range(2):
            assert history.losses[b, :20].tolist() == pytest.approx(losses[b].tolist(), rel=1e-4, abs=1e-6)
            assert max(apart(history.tokens[b, step], tokens[b, step]) for step in range(20)) < 1e-4
            assert apart(engine.token[b], tokens[b, 20]) < 1e-4
            assert apart(read[b], fields[b]) < 1e-4
            assert history.losses[b, -1] < history.losses[b, 0]
        assert torch.equal(history.tokens[:, -1], engine.token)


def test_bf16_products_stay_near_float32_and_keep_float32_state() -> None:
    config = REDUCED
    parameters, images, targets = draw(config, 1)
    engines = [Engine(config, parameters, precision=name) for name in ("fp32", "bf16")]
    histories = []
    for engine in engines:
        engine.load(images, targets)
        histories.append(engine.run(20))
        assert {value.dtype for value in engine.weights.values()} == {torch.float32}
    fp32, bf16 = engines
    assert {value.dtype for value in fp32.gradients.values()} == {torch.float32}
    narrow = {name for name, value in bf16.gradients.items() if value.dtype == torch.bfloat16}
    assert narrow == {"mlp.layer2.weight", "mlp.layer3.weight"}
    assert apart(bf16.token, fp32.token) < 0.02
    assert torch.allclose(histories[1].losses, histories[0].losses, rtol=0.02)
    for engine in engines:
        engine.reset()
        engine.evaluate()
        engine.backward()
    for name, gradient in fp32.gradients.items():
        assert apart(bf16.gradients[name], gradient) < (0.1 if cancels(name) else 0.03), name


def test_drawn_locations_are_the_plain_form_at_these_locations() -> None:
    config = random_config(3, "query")
    parameters, images, targets = draw(config, 2)
    engine = Engine(config, parameters, batch=2, lr=LR, queries=3, seed=5)
    engine.load(images, targets)
    drawn = engine._draw(4)
    assert drawn is not None and drawn.shape == (4, 3)
    assert not torch.equal(drawn[0], drawn[1])
    history = engine.run(4)
    model = plain(config, parameters)
    adam = torch.optim.Adam(model.parameters(), lr=LR)
    rows, cols = grid_locations(config.grid)
    for step in range(4):
        adam.zero_grad()
        token = model(images[1:], rows[drawn[step]], cols[drawn[step]])[0]
        value = plain_loss(token, targets[1], "mse")
        value.backward()
        adam.step()
        assert float(history.losses[1, step]) == pytest.approx(value.item(), rel=1e-5)
    with torch.no_grad():
        assert apart(engine.token[1], model(images[1:])[0]) < 1e-4  # the answer is read from all locations


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
def test_reset_restores_everything_bit_by_bit(precision_name: str) -> None:
    config = random_config(4, "query")
    parameters, images, targets = draw(config, 2)
    engine = Engine(config, parameters, batch=2, precision=precision_name)  # type: ignore[arg-type]
    engine.load(images, targets)
    first = engine.run(5)
    token, column = engine.token.clone(), engine.column.clone()
    rows = engine.rows
    for state in (rows.weight_rows, rows.gradient_rows, rows.first_moment, rows.second_moment, engine.updates):
        state.fill_(float("nan"))  # the worst that an interrupted run could leave
    engine.frozen.fill_(1)
    engine.finite.fill_(False)
    engine.reset()
    for name, value in engine.weights.items():
        assert torch.equal(value, parameters[name].expand_as(value)), name
    again = engine.run(5)
    assert torch.equal(again.losses, first.losses) and torch.equal(again.cosines, first.cosines)
    assert torch.equal(engine.token, token) and torch.equal(engine.column, column)
    assert engine.finite.all()
    assert all(value.isfinite().all() for value in (*engine.weights.values(), *engine.gradients.values()))


def test_a_sample_within_the_tolerance_is_frozen_while_the_rest_goes_on() -> None:
    config = random_config(5, "query")
    parameters, images, targets = draw(config, 3)
    engine = Engine(config, parameters, batch=3, lr=LR)
    engine.load(images, targets)
    losses = engine.run(30).losses
    fastest = int(losses[:, 15].argmin())
    tolerance = float(losses[fastest, 15])
    reached = [int((row <= tolerance).nonzero()[0]) if (row <= tolerance).any() else 30 for row in losses]
    assert reached[fastest] <= 15 and max(reached) > reached[fastest]

    stopping = Engine(config, parameters, batch=3, lr=LR, tolerance=tolerance)
    stopping.load(images, targets)
    history = stopping.run(30)
    assert stopping.updates.tolist() == reached
    for b, steps in enumerate(reached):
        short = Engine(config, parameters, batch=3, lr=LR)
        short.load(images, targets)
        short.run(steps)
        assert torch.equal(stopping.token[b], short.token[b])
        assert all(torch.equal(stopping.weights[name][b], short.weights[name][b]) for name in stopping.weights)
        assert torch.equal(history.losses[b, : steps + 1], losses[b, : steps + 1])
        assert (history.losses[b, steps:] == history.losses[b, min(steps, 29)]).all()


def test_a_sample_that_is_not_finite_does_not_touch_its_neighbours() -> None:
    config = random_config(6, "query")
    parameters, images, targets = draw(config, 3)
    clean = Engine(config, parameters, batch=3)
    clean.load(images, targets)
    clean.run(5)
    targets[1, 0] = float("inf")
    engine = Engine(config, parameters, batch=3)
    engine.load(images, targets)
    engine.run(5)
    assert engine.finite.tolist() == [True, False, True]
    assert engine.updates.tolist() == [5.0, 0.0, 5.0]
    assert torch.equal(engine.token[[0, 2]], clean.token[[0, 2]])
    assert torch.equal(engine.weights["mlp.layer2.weight"][1], parameters["mlp.layer2.weight"])


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
def test_flops_of_a_step_at_the_papers_size(precision_name: str) -> None:
    """The two middle layers, three products each, and hardly anything else."""
    config = APMConfig.preset("paper", dim=512)
    n, grid, (h1, h2, h3), half = config.cells, config.grid, config.hidden, config.position_dim // 2
    middle = 3 * 2 * n * (h1 * h2 + h2 * h3)
    assert middle == pytest.approx(64.4e9, rel=1e-3)
    select = 2 * 2 * n * 2 * grid * h1  # adding up rows and columns, and back
    positions = 2 * 2 * 2 * grid * half * h1
    column = 2 * 2 * n * h1 + 2 * 2 * n * 3 * config.patch_size**2
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes are all that is counted
        initial = {name: torch.empty(shape) for name, shape in parameter_shapes(config).items()}
        engine = Engine(config, initial, precision=precision_name)  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter:
            engine.step()
    small = counter.get_total_flops() - middle - select - positions - column
    # the readout: about a dozen products of (heads, N) with the width of the last hidden layer or of the token
    assert 0 < small < 12 * 2 * config.heads * n * (h3 + config.dim)
    assert counter.get_total_flops() < 1.05 * middle


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
def test_a_step_makes_no_large_tensors(precision_name: str) -> None:
    config = REDUCED
    parameters, images, targets = draw(config, 1)
    engine = Engine(config, parameters, precision=precision_name)  # type: ignore[arg-type]
    engine.load(images, targets)
    engine.step()
    counts = []
    for _ in range(3):
        with Allocations() as allocations:
            engine.step()
        counts.append(allocations.bytes)
    assert counts[0] == counts[1] == counts[2]  # nothing grows
    largest = 4 * config.hidden[0] * config.hidden[1]  # one weight
    assert 0 < counts[0] < largest  # all of a step's tensors together


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("precision_name", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_the_replayed_graph_is_the_eager_loop(precision_name: str, tolerance: float) -> None:
    config = random_config(7, "query")
    parameters, images, targets = draw(config, 3)
    last = f"cuda:{torch.cuda.device_count() - 1}"  # not the current one, where there are several
    eager = Engine(config, parameters, batch=3, lr=LR)
    graph = Engine(config, parameters, batch=3, lr=LR, precision=precision_name, device=last)  # type: ignore[arg-type]
    for engine in (eager, graph):
        engine.load(images, targets)
    expected = eager.run(20)
    assert expected.losses[0, -1] < 0.99 * expected.losses[0, 0]  # a graph that does nothing would be seen
    for _ in range(2):  # the capture, then a replay of the same graph
        graph.reset()
        history = graph.run(20)
        assert torch.allclose(history.losses.cpu(), expected.losses, rtol=tolerance)
        assert apart(graph.token.cpu(), eager.token) < tolerance
        assert graph.updates.tolist() == [20.0] * 3
