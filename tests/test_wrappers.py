"""Models that are given wrapped."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import idlefx
from tests.models.small import build, images


@pytest.fixture(scope="module")
def model():
    return build("vit")


@pytest.fixture(scope="module")
def wanted(model):
    return idlefx.convert(model, layers=[1, 3], keep=0.5)


@pytest.fixture
def alone(tmp_path):
    """One process that talks to itself, as DistributedDataParallel wants."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check(wrapped, model, wanted):
    """It converts as the model inside does, guessed inputs, names and facts included."""
    idle = idlefx.convert(wrapped, layers=[1, 3], keep=0.5)
    x = images(model, 3)
    assert idle(x).equal(wanted(x))
    assert list(idle.state_dict()) == list(model.state_dict())
    assert idle.conversion.origin == wanted.conversion.origin
    assert idle.num_classes == model.num_classes
    assert idle.training == model.training
    assert [block.path for block in idlefx.inspect(wrapped)] == [block.path for block in wanted.plan.blocks]


@torch.no_grad()
@pytest.mark.parametrize(
    "wrap",
    [torch.compile, DataParallel, lambda model: torch.compile(DataParallel(model))],
    ids=["compile", "dp", "two"],
)
def test_wrappers_are_taken_off(wrap, model, wanted):
    check(wrap(model), model, wanted)


@torch.no_grad()
def test_distributed_models_are_taken_out(alone, model, wanted):
    check(DistributedDataParallel(model), model, wanted)
    check(torch.compile(DistributedDataParallel(model)).eval(), model, wanted)


@torch.no_grad()
def test_without_copy_the_parameters_are_those_of_the_model_inside():
    model = build("vit")
    idle = idlefx.convert(torch.compile(model), layers=[1], keep=0.5, copy=False)
    assert all(parameter is model.get_parameter(name) for name, parameter in idle.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "compile_part", [torch.compile, lambda block: block.compile() or block], ids=["call", "method"]
)
def test_parts_may_be_compiled(compile_part):
    model, plain = build("vit"), build("vit")
    model.blocks[1] = compile_part(model.blocks[1])
    example, x = images(plain, 2), images(plain, 3)
    idle = idlefx.convert(model, layers=[1], keep=0.5, example_inputs=example)
    assert idle(x).equal(idlefx.convert(plain, layers=[1], keep=0.5)(x))
    assert list(idle.state_dict()) == list(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_models_of_torch_jit_are_refused(model):
    traced = torch.jit.trace(model, images(model, 2))
    for given in (traced, DataParallel(traced)):
        for ask in (idlefx.inspect, lambda each: idlefx.convert(each, layers=[1], keep=0.5)):
            with pytest.raises(idlefx.InputError, match=r"the model is a TopLevelTracedModule of torch\.jit, which no"):
                ask(given)


def test_what_is_no_module_is_refused(model):
    with pytest.raises(idlefx.InputError, match=r"expected a torch\.nn\.Module, got method"):
        idlefx.convert(nn.Module.forward.__get__(model), layers=[1], keep=0.5)
