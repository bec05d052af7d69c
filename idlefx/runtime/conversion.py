"""What a converted model remembers of how it was made."""

from dataclasses import dataclass

from torch import fx

from idlefx.options import PlanOptions
from idlefx.records import BlockTable, ModelFacts, Plan
from idlefx.runtime.answers import Answers
from idlefx.runtime.call_checks import CallChecks


@dataclass(frozen=True)
class Form:
    """What a model does in one mode.

    Attributes:
        source: The graph as it was captured.
        plan: The plan, whose blocks are nodes of that graph.
        graph: The graph as it was rewritten.
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

    @property
    def plan(self) -> Plan:
        """Which block keeps how many image tokens."""
        return self.evaluation.plan

    @property
    def blocks(self) -> BlockTable:
        """The table of the model's blocks."""
        return self.plan.blocks

    def form(self, training: bool) -> Form:
        """What the model does in train or in eval mode."""
        return self.training if training else self.evaluation
