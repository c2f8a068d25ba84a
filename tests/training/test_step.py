"""One train step on real gloo workers equals the step written out by hand in plain PyTorch."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cluster.errors import ConfigError
from training.models.two_stage import Losses, TwoStage
from training.step import StepConfig

Dump = Callable[[int, str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The workers' program, for the batch and the settings that they ran with."""
    spec = importlib.util.spec_from_file_location("sharded_program", Path(__file__).with_name("sharded_program.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dense_from(start: Mapping[str, torch.Tensor], program: ModuleType) -> TwoStage:
    dense = TwoStage(program.model_config(0.0), program.DIM, program.TEXT_DIM)
    dense.load_state_dict({name[6:]: value for name, value in start.items() if name.startswith("dense.")})
    return dense


def assert_close(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def tables(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: state[name] for name in ("item", "user", "item.momentum", "user.momentum")}


def moments(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adam's averages are linear and square in the gradient; the weights divide by it and show its rounding."""
    return {name: value for name, value in state.items() if name.endswith((".exp_avg", ".exp_avg_sq", ".step"))}


def dense(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith("dense.")}


@pytest.mark.parametrize("workers", [1, 2])
def test_sharded_lookup_returns_the_rows_bit_for_bit(sharded: Dump, program: ModuleType, workers: int) -> None:
    start, found = sharded(workers, "start"), sharded(workers, "lookup")
    batch = program.share_of_batch(0, workers)
    assert torch.equal(found["item"], start["item"][batch.item_rows_N])
    assert torch.equal(found["user"], start["user"][batch.user_row_B])


@pytest.mark.parametrize("workers", [1, 2])
def test_sharded_forward_equals_unsharded(sharded: Dump, program: ModuleType, workers: int) -> None:
    start, batch = sharded(workers, "start"), program.share_of_batch(0, 1)
    model = dense_from(start, program).eval()
    with torch.no_grad():
        losses: Losses = model(batch, start["item"][batch.item_rows_N], start["user"][batch.user_row_B])
    assert_close(sharded(workers, "forward"), losses._asdict(), atol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_sharded_step_equals_a_step_written_out(sharded: Dump, program: ModuleType, workers: int) -> None:
    start, after = sharded(workers, "start"), sharded(workers, "first_step")
    batch, model = program.share_of_batch(0, 1), dense_from(start, program)
    read = {"item": batch.item_rows_N, "user": batch.user_row_B}
    rows = {name: start[name][index].requires_grad_() for name, index in read.items()}
    adam = torch.optim.AdamW(model.parameters(), lr=program.STEP.learning_rate, weight_decay=program.STEP.weight_decay)

    losses: Losses = model(batch, rows["item"], rows["user"])
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), program.STEP.clip_norm)
    adam.step()
    for name, index in read.items():
        gradient_ND = rows[name].grad
        assert gradient_ND is not None
        # Row-wise Adagrad: one accumulator a row, the mean of the squared gradient.
        momentum_N = gradient_ND.square().mean(1)
        step_ND = program.TABLES.learning_rate * gradient_ND / (momentum_N.sqrt() + 1e-8).unsqueeze(1)
        expected = start[name].index_copy(0, index, start[name][index] - step_ND)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(after[f"{name}.momentum"][index], momentum_N, rtol=1e-3, atol=1e-8)

    assert_close(sharded(workers, "first_losses"), losses._asdict(), atol=1e-5)
    expected_dense = {f"dense.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    assert_close(dense(after), expected_dense, atol=program.STEP.learning_rate / 50)


@pytest.mark.parametrize("name", ["first_step", "second_step"])
def test_two_workers_learn_what_one_learns(sharded: Dump, program: ModuleType, name: str) -> None:
    one, two = sharded(1, name), sharded(2, name)
    assert_close(tables(two), tables(one), atol=1e-5)
    assert_close(moments(two), moments(one), atol=1e-6)
    assert_close(dense(two), dense(one), atol=program.STEP.learning_rate / 50)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_moves_the_rows_it_read_and_no_others(sharded: Dump, program: ModuleType, workers: int) -> None:
    start, after = sharded(workers, "start"), sharded(workers, "first_step")
    moved = (start["item"] != after["item"]).any(1).nonzero().flatten()
    assert moved.tolist() == program.share_of_batch(0, 1).item_rows_N.tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_at_rate_0_nothing_moves(sharded: Dump, workers: int) -> None:
    before, after = sharded(workers, "continued"), sharded(workers, "rate_0")
    kept = [*dense(before), "item", "user"]
    assert [name for name in kept if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_seed_gives_the_same_bits_twice(sharded: Dump, workers: int) -> None:
    once, again = sharded(workers, "seeded"), sharded(workers, "seeded_again")
    assert [name for name in once if not torch.equal(once[name], again[name])] == []
    assert not torch.equal(once["item"], sharded(workers, "second_step")["item"])


@pytest.mark.parametrize(("field", "value"), [("learning_rate", 0.0), ("clip_norm", -1.0)])
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    settings = {"learning_rate": 0.1, "weight_decay": 0.0, "clip_norm": 1.0}
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        StepConfig(**{**settings, field: value})
