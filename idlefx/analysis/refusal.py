"""The refusal by which the analysis stops at an operation; what leaves the analysis is an `IdleFxError`."""

from typing import NoReturn

from torch import fx

from idlefx.graph.queries import source_line


class RefusedOperation(Exception):
    """The token axis cannot be followed through an operation, or not for some of the tokens only.

    Whoever follows tokens catches it: `find_blocks` writes it into the table as the reason why a block cannot idle.

    Attributes:
        node: The operation, where one is refused.
    """

    def __init__(self, message: str, node: fx.Node | None = None) -> None:
        super().__init__(message)
        self.node = node


class RefusedMovement(RefusedOperation):
    """Tokens are moved in a way that gives no windows of which some could work alone."""


def refuse(node: fx.Node, reason: str) -> NoReturn:
    """Refuse a node, naming the operation and the user's line.

    Raises:
        RefusedOperation: Always.
    """
    raise RefusedOperation(f"{node.target} {reason} (at {source_line(node)})", node)


def refuse_movement(node: fx.Node, reason: str) -> NoReturn:
    """Refuse what a node does to windows, naming the operation and the user's line.

    Raises:
        RefusedMovement: Always.
    """
    raise RefusedMovement(f"{node.target} {reason} (at {source_line(node)})", node)
