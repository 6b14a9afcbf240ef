"""The loss's state through what others store states with: tensors alone, the same names and shapes at all times."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loss_cases import make_batch, make_loss, same, snapshot, train_step
from safetensors.torch import load_file, load_model, save_file, save_model
from tiers import few
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import gcahng

OPTIONS = {"edge_dropout": 0.3, "epochs": 4, "steps_per_epoch": 2}


def trained(steps: int = 3, dtype: torch.dtype = torch.float64, **options) -> gcahng.GCAHNGLoss:
    gca = make_loss(dtype=dtype, **(OPTIONS | options))
    go_on(gca, 0, steps)
    return gca


def go_on(gca: gcahng.GCAHNGLoss, first: int, last: int) -> list:
    return [train_step(gca, *make_batch(step, gca.classifier.weight.dtype)) for step in range(first, last)]


def other() -> gcahng.GCAHNGLoss:
    """A loss with other weights, another seed, and steps behind it."""
    return trained(1, seed=99)


def held(module: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"model": nn.Linear(2, 2), "loss": module})


# -- ways to store a state. Each takes a module that is stored, one that takes it over, and a folder.


def by_safetensors_model(source: nn.Module, target: nn.Module, folder: Path) -> None:
    save_model(source, str(folder / "state.safetensors"))
    load_model(target, str(folder / "state.safetensors"))


def by_safetensors_file(source: nn.Module, target: nn.Module, folder: Path) -> None:
    save_file(source.state_dict(), folder / "state.safetensors")
    target.load_state_dict(load_file(folder / "state.safetensors"))


def by_torch_save(source: nn.Module, target: nn.Module, folder: Path) -> None:
    torch.save(source.state_dict(), folder / "state.pt")
    target.load_state_dict(torch.load(folder / "state.pt", weights_only=True))


def by_distributed_checkpoint(source: nn.Module, target: nn.Module, folder: Path) -> None:
    dcp.save({"module": source}, checkpoint_id=folder)
    dcp.load({"module": target}, checkpoint_id=folder)


def by_distributed_checkpoint_of_states(source: nn.Module, target: nn.Module, folder: Path) -> None:
    dcp.save(source.state_dict(), checkpoint_id=folder)
    state = target.state_dict()
    dcp.load(state, checkpoint_id=folder)
    target.load_state_dict(state)


def by_state_dict_api(source: nn.Module, target: nn.Module, folder: Path) -> None:
    dcp.save(get_model_state_dict(source), checkpoint_id=folder)
    state = get_model_state_dict(target)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(target, state)


def by_full_state_dict(source: nn.Module, target: nn.Module, folder: Path) -> None:
    """As FSDP and its like are saved whole, and loaded from the first process."""
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(source, options=options)
        set_model_state_dict(target, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    finally:
        distributed.destroy_process_group()


WAYS = [
    by_safetensors_model,
    by_safetensors_file,
    by_torch_save,
    by_distributed_checkpoint,
    by_distributed_checkpoint_of_states,
    by_state_dict_api,
    by_full_state_dict,
]


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("within", few([pytest.param(False, id="alone"), pytest.param(True, id="in-a-module")]))
@pytest.mark.parametrize("store", WAYS, ids=lambda way: way.__name__)
def test_going_on_is_bit_identical(store, within, tmp_path):
    source, target = trained(), other()
    store(held(source) if within else source, held(target) if within else target, tmp_path)
    assert same(target.state_dict(), source.state_dict())
    assert same(go_on(target, 3, 6), go_on(source, 3, 6))
    assert same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda gca: pickle.loads(pickle.dumps(gca))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_bit_identically(make):
    gca = trained()
    twin = make(gca)
    before = snapshot(gca)
    found = go_on(twin, 3, 6)
    assert same(snapshot(gca), before)
    assert same(go_on(gca, 3, 6), found)
    assert same(snapshot(twin), snapshot(gca))


def test_a_state_is_tensors_of_the_same_names_and_shapes():
    def kinds(gca):
        state = gca.state_dict()
        assert all(isinstance(value, Tensor) for value in state.values())
        return {name: (value.shape, value.dtype, value.is_contiguous()) for name, value in state.items()}

    gca = make_loss(**OPTIONS)
    before = kinds(gca)
    gca.graph_network.layers[0].requires_grad_(False)  # what is frozen has moments, too
    go_on(gca, 0, 3)
    assert kinds(gca) == before
    places = [value.untyped_storage().data_ptr() for value in gca.state_dict().values()]
    assert len(set(places)) == len(places), "savers leave out all but one of several tensors that share memory"


def test_moments_exist_from_the_start():
    gca = make_loss()
    for optimizer in (gca.graph_optimizer, gca.classifier_optimizer):
        (group,) = optimizer.param_groups
        assert [*optimizer.state] == group["params"]
        for parameter, state in optimizer.state.items():
            assert state["step"] == 0 and state["step"].dtype is torch.float32
            assert all(not state[name].any() for name in ("exp_avg", "exp_avg_sq"))
            assert state["exp_avg"].shape == parameter.shape and state["exp_avg"].dtype is parameter.dtype


def test_the_state_dict_is_a_snapshot_of_the_optimizers():
    gca = trained(1)
    extra = gca.state_dict()["_extra_state"]
    kept = extra.clone()
    go_on(gca, 1, 2)
    assert torch.equal(extra, kept)


def test_rates_that_were_set_by_hand_are_kept():
    gca, target = trained(), make_loss(**OPTIONS)
    gca.graph_optimizer.param_groups[0] |= {"lr": 0.125, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.0}
    target.load_state_dict(gca.state_dict())
    (group,) = target.graph_optimizer.param_groups
    wanted = {"lr": 0.125, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.0}
    assert {name: group[name] for name in wanted} == wanted
    assert same(go_on(gca, 3, 4), go_on(target, 3, 4))


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**63 - 1])
def test_seeds_are_kept_whole(seed):
    target = make_loss()
    target.load_state_dict(make_loss(seed=seed).state_dict())
    assert target.seed == seed and type(target.seed) is int


def test_a_state_of_another_precision_is_taken_over():
    source, target = trained(dtype=torch.float32), trained(dtype=torch.float64, seed=5)
    target.load_state_dict(source.state_dict())
    assert same(target.state_dict(), copy.deepcopy(source).double().state_dict())
    source.load_state_dict(target.state_dict())
    assert same(go_on(source, 3, 4), go_on(trained(dtype=torch.float32), 3, 4))


# -- moves


def test_low_precision_and_back_breaks_no_counter():
    """float16 ends at 65,504 and has 11 bits; the squares that Adam keeps are 0 in it."""
    gca = trained(dtype=torch.float32)
    gca.mean_generator = 123456.0
    gca._counted_steps.fill_(4097)
    names = ("draw", "_mean_metric", "_mean_generator", "_metric_sum", "_generator_sum", "_counted_steps")
    before = {name: gca.state_dict()[name] for name in names} | {"extra": gca.state_dict()["_extra_state"]}
    for move in (nn.Module.half, nn.Module.bfloat16, lambda module: module.type(torch.float16)):
        move(gca).float()
        assert same({name: gca.state_dict()[name] for name in names} | {"extra": gca.get_extra_state()}, before)
    assert gca.mean_generator == 123456.0
    go_on(gca, 3, 4)


def test_on_the_meta_device_there_is_a_state_too():
    with torch.device("meta"):
        gca = gcahng.GCAHNGLoss(7, 8, heads=2, seed=0)
    state = gca.state_dict()
    assert {value.device.type for value in state.values()} == {"meta"}
    wanted = make_loss(dtype=torch.float32).state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: v.shape for name, v in wanted.items()}

    for tensor in torch.empty(0), *gca.to_empty(device="cpu").parameters():
        nn.init.normal_(tensor) if tensor.numel() else None
    assert gca.mean_metric == gca.mean_generator == 1e6 and gca.draw == 0
    assert not any(moments.any() for o in (gca.graph_optimizer,) for s in o.state.values() for moments in s.values())
    gca.load_state_dict(wanted)
    assert same(gca.state_dict(), wanted)


# -- version 1


def batch_of_file(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.arange(3).repeat(2)


def test_a_file_of_version_1_goes_on():
    """`version_1.pt` holds the state after five steps and the losses of the next four, as gcahng 0.1 wrote them."""
    saved = torch.load(Path(__file__).parent / "version_1.pt", weights_only=True)
    gca = gcahng.GCAHNGLoss(3, 4, layers=1, heads=1, seed=9, epochs=4, steps_per_epoch=3, impl="reference").double()
    gca.load_state_dict(saved["state"])
    assert gca.seed == 5 and gca.state_dict()["_counted_steps"] == 2
    losses = torch.stack([train_step(gca, *batch_of_file(seed))[0] for seed in range(5, 9)])
    torch.testing.assert_close(losses, saved["losses"], rtol=1e-9, atol=0)


def as_version_1(gca: gcahng.GCAHNGLoss) -> dict:
    """The state dict that gcahng wrote before it had version 2."""
    state = {name: value.clone() for name, value in gca.state_dict().items()}
    for name in ("_mean_metric", "_mean_generator"):
        state[name] = state[name] / state.pop(f"{name}_weight")
    stepped = [copy.deepcopy(o.state_dict()) for o in (gca.graph_optimizer, gca.classifier_optimizer)]
    for optimizer in stepped:  # moments came with the first step
        optimizer["state"] = {number: moments for number, moments in optimizer["state"].items() if moments["step"]}
    state["_extra_state"] = {
        "version": 1,
        "seed": gca.seed,
        "epoch": gca._epoch,
        "steps_in_epoch": int(state.pop("_counted_steps")),
        "graph_optimizer": stepped[0],
        "classifier_optimizer": stepped[1],
    }
    return state


@pytest.mark.parametrize("steps", [0, 1, 3, 4], ids=["new", "first-epoch", "mid-epoch", "epoch-end"])
@pytest.mark.parametrize("within", [False, True], ids=["alone", "in-a-module"])
def test_a_state_of_version_1_goes_on_bit_identically(steps, within):
    means = steps != 1
    source, target = make_loss(means=means, **OPTIONS), other()
    go_on(source, 0, steps)
    file = io.BytesIO()
    torch.save(as_version_1(source), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    if within:
        module = held(target)
        rest = {f"model.{name}": value for name, value in module["model"].state_dict().items()}
        module.load_state_dict({f"loss.{name}": value for name, value in state.items()} | rest)
    else:
        target.load_state_dict(state)
    assert same(target.state_dict(), source.state_dict())
    assert same(go_on(target, steps, steps + 3), go_on(source, steps, steps + 3))


def test_weights_of_version_1_alone_begin_an_epoch():
    """The sums are of a number of steps that went with the extra state."""
    state, target = as_version_1(trained()), make_loss(**OPTIONS)
    del state["_extra_state"]
    target.load_state_dict(state, strict=False)
    assert target.mean_generator == trained().mean_generator
    found = [logs["J_gen"] for _, _, logs in go_on(target, 0, 2)]
    torch.testing.assert_close(target.mean_generator, torch.stack(found).mean(), rtol=1e-12, atol=0)
