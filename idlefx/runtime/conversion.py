"""What a converted model remembers of how it was made."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from idlefx.errors import InputError
from idlefx.graph.notes import Layer
from idlefx.options import PlanOptions
from idlefx.records import BlockTable, ModelFacts, Plan
from idlefx.runtime.answers import Answers
from idlefx.runtime.call_checks import CallChecks
from idlefx.runtime.labels import Loss
from idlefx.runtime.swaps import read_weight


@dataclass(frozen=True)
class Form:
    """What a model does in one mode.

    Attributes:
        source: The graph as it was captured.
        plan: The plan, whose blocks are nodes of that graph.
        graph: The graph as it was rewritten, which calls the model's layers.
    """

    source: fx.Graph
    plan: Plan
    graph: fx.Graph


@dataclass(frozen=True)
class Conversion:
    """What a converted model remembers of how it was made.

    Attributes:
        options: What was asked for.
        evaluation: What the model does in eval mode.
        training: What it does in train mode; the same object where the mode makes no difference.
        facts: What is known of the model's images and classes.
        batch_free: Whether the batch size is free.
        origin: What may make a model like this one again: its name in timm, or its class.
        inputs_guessed: Whether the example inputs were guessed, and not given.
        calls: How it is called, and what of that the trace has built in.
        answers: What the model says of itself to optimisers, loaders and people.
        called: The layers that the graphs call as modules, by path.
        custom_gradient: What in the model has gradients of its own, which the graphs do not have: it is for inference
            only. Empty if nothing has.
        weights: One number of every parameter, as it was.
        loss: What computes the loss of calls with labels; None if the trace has labels, or the model no such function.
        numbers: Tensors of whole numbers in the example by argument, where its batch is the only one.
    """

    options: PlanOptions
    evaluation: Form
    training: Form
    facts: ModelFacts
    batch_free: bool
    origin: str
    inputs_guessed: bool
    calls: CallChecks
    answers: Answers
    called: Mapping[str, Layer]
    custom_gradient: str = ""
    weights: tuple[float, ...] = ()
    loss: Loss | None = None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """Which block keeps how many image tokens."""
        return self.evaluation.plan

    @property
    def blocks(self) -> BlockTable:
        """The table of the model's blocks."""
        return self.plan.blocks

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """All graphs that the model may run."""
        return self.evaluation.graph, self.training.graph

    @property
    def free_layers(self) -> tuple[str, ...]:
        """Paths of the layers that are only called, so that they may be adapted, sharded, hooked or replaced.

        Of the other layers the weights are read too, such as to score tokens.
        """
        reads = [node for graph in self.graphs for node in graph.find_nodes(op="call_function", target=read_weight)]
        read = {node.args[2] for node in reads}
        return tuple(path for path in self.called if path not in read)

    def check_gradients(self) -> None:
        """Refuse to train where gradients would not be the model's.

        Raises:
            InputError: The model has gradients of its own.
        """
        if self.custom_gradient:
            raise InputError(
                f"train: {self.custom_gradient} has gradients of its own, which a converted model does not have: it is "
                "for inference only, in eval mode. For training, write it with plain operations and `.detach()`, or "
                "convert the part of the model that is without it"
            )

    def form(self, training: bool) -> Form:
        """What the model does in train or in eval mode."""
        return self.training if training else self.evaluation
