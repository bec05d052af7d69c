"""A converted model tells optimisers and loaders what its original tells them."""

import copy
import pickle
from functools import cached_property

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import nn

import idlefx
from idlefx.capture.export import capture
from idlefx.pipeline import spell
from idlefx.runtime.answers import answers_of
from idlefx.training.config import Settings
from idlefx.training.distributed import World
from idlefx.training.feature_taps import tap
from idlefx.training.history import History
from idlefx.training.labelled import Labelled
from idlefx.training.loader import ImageLoader
from idlefx.training.trainer import Trainer
from tests.models.small import build, images

NAMES = {"vit": "vit_tiny_patch16_224", "beit": "beit_base_patch16_224"}
SMALL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """A model and what it was converted into."""
    model = timm.create_model(NAMES[request.param], **SMALL).eval()
    return model, idlefx.convert(model, layers=[1], keep=0.5)


def told(model, **settings):
    """By name, how an optimiser of timm treats a parameter: its weight decay, and the scale of its learning rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, **settings).param_groups
    return {names[id(p)]: (g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups for p in g["params"]}


@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.75}], ids=["decay", "layers"])
def test_optimisers_treat_parameters_as_the_models(pair, settings):
    model, idle = pair
    wanted = told(model, **settings)
    assert len(set(wanted.values())) > 1 and wanted["cls_token"][0] == 0
    for form in (idle, copy.deepcopy(idle), idlefx.with_cut_loss(idle)):
        assert told(form, **settings) == wanted


def test_loaders_and_people_are_told_the_same(pair):
    model, idle = pair
    assert resolve_model_data_config(idle) == {**resolve_model_data_config(model)}
    assert idle.pretrained_cfg == model.pretrained_cfg and idle.default_cfg == model.default_cfg
    assert (idle.num_classes, idle.embed_dim, idle.num_features) == (10, 48, 48)
    assert idle.group_matcher(coarse=True) == model.group_matcher(coarse=True)
    idle.no_weight_decay().clear()  # what was returned is the caller's
    assert idle.no_weight_decay() == model.no_weight_decay()
    idle.num_classes = 5
    assert idle.num_classes == 5 and model.num_classes == 10


def test_the_head_can_be_asked_for(pair):
    model, idle = pair
    assert model.get_classifier() is model.head
    for form in (copy.deepcopy(idle), idlefx.with_cut_loss(idle)):
        assert form.get_classifier() is form.head and form.get_classifier().weight.equal(model.head.weight)


@pytest.mark.parametrize("name", ["forward_features", "forward_head", "get_intermediate_layers", "reset_classifier"])
def test_methods_that_are_not_kept_are_refused_by_name(pair, name):
    model, idle = pair
    words = (
        rf"^model: `{name}` of {type(model).__name__} is not kept, .* torch.compile\(model.{name}, backend=\"idlefx\""
    )
    if hasattr(model, name):
        with pytest.raises(idlefx.MethodError, match=words):
            getattr(idle, name)
    assert not hasattr(idle, name) and not hasattr(copy.deepcopy(idle), name)
    with pytest.raises(AttributeError, match="has no attribute 'heard_of_by_nobody'"):
        _ = idle.heard_of_by_nobody


def test_mean_of_a_model_of_its_own():
    model = build("vit")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    assert resolve_model_data_config(idlefx.convert(model, layers=[1], keep=0.5))["mean"] == (0.1, 0.2, 0.3)


class Configuration:
    """What other libraries call a configuration."""

    def __init__(self, width: int) -> None:
        self.width = width

    def to_dict(self):
        return vars(self)


def test_configurations_are_kept_where_files_can_name_them():
    class Local(Configuration):
        """One that nobody could import."""

    model = nn.Linear(1, 1)
    model.config, model.other = Configuration(48), Local(48)
    attributes = answers_of(model).attributes
    assert attributes["config"].width == 48 and attributes["config"] is not model.config
    assert "other" not in attributes


def test_feature_extractors_tell_what_their_features_are():
    options = {**SMALL, "features_only": True, "out_indices": (0, 1)}
    model, x = timm.create_model(NAMES["vit"], **options).eval(), torch.randn(2, 3, 64, 64)
    idle = idlefx.convert(model, layers=[1], keep=0.5, example_inputs=x)
    for form in (idle, pickle.loads(pickle.dumps(idle))):
        for question in ("channels", "reduction", "module_name"):
            assert getattr(form.feature_info, question)() == getattr(model.feature_info, question)()
        assert [feature.shape[1] for feature in form(x)] == form.feature_info.channels()


def test_methods_of_a_class_are_no_records():
    class Made(nn.Module):
        """A model with what Hugging Face's classes hold."""

        def __init__(self) -> None:
            super().__init__()
            self.model = build("vit")

        @classmethod
        def from_name(cls, name):
            """Make one."""
            return cls()

        @cached_property
        def depth(self) -> int:
            """How many blocks there are."""
            return 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    idle = idlefx.convert(Made(), [1], 0.5, example_inputs=images(build("vit"), 2))
    assert not {"from_name", "depth"} & idle.conversion.answers.attributes.keys()


def test_what_a_model_does_not_say_its_form_does_not_either():
    class Silent(nn.Module):
        """A model that says only one thing."""

        def __init__(self) -> None:
            super().__init__()
            self.vit, self.plan = build("vit"), "my own plan"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.vit(x)

    model = Silent().eval()
    idle = idlefx.convert(model, layers=[1], keep=0.5, example_inputs=images(model.vit, 2))
    for name in ("no_weight_decay", "group_matcher", "pretrained_cfg", "num_classes"):
        assert not hasattr(idle, name)
    assert idle.plan == "my own plan" and idle.conversion.plan[0].block == 1


def test_finetuning_decays_what_the_model_lets_decay(pair):
    model, idle = pair
    idle = copy.deepcopy(idle)
    teacher, student = tap(spell(capture(model).eval_graph)), tap(idlefx.with_cut_loss(idle).train())
    settings = Settings(train_all=True, weight_decay=0.05).settled(labelled=True, idle="rest")
    val = ImageLoader([(images(model, 1)[0], 0)], 1)
    objective = Labelled(student, teacher, settings, val, History.of(idle), 2)
    trainer = Trainer(idle.eval(), objective, settings, steps=1, batch_size=2, world=World(torch.device("cpu")))
    names = {id(parameter): name for name, parameter in idle.named_parameters()}
    found = {names[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    wanted = told(model)
    assert {name: wanted[name][0] for name in found} == found
    assert found["cls_token"] == 0
