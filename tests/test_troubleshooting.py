"""Every refusal of the code, every reason why a block cannot idle and every warning is explained to users.

The messages are collected from the source, so that docs/troubleshooting.md cannot fall behind it.
"""

import ast
import re
from pathlib import Path

import idlefx

ROOT = Path(__file__).resolve().parent.parent
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
HOLE = "\0"  # stands in a message for what is filled in


def template(node: ast.expr) -> str | None:
    """A message as it stands in the code, with holes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return None


def messages(*functions: str, argument: int = 0) -> set[str]:
    """The messages that calls of these functions are given, over all of the package."""
    found = set()
    for file in {path.resolve() for place in ("idlefx", "passes") for path in (ROOT / place).rglob("*.py")}:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and len(node.args) > argument:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                text = template(node.args[argument])
                if name in functions and text:
                    found.add(text)
    return found


def refusals() -> set[str]:
    kinds, new = {idlefx.IdleFxError}, {idlefx.IdleFxError}
    while new:
        new = {kind for each in new for kind in each.__subclasses__()}
        kinds |= new
    return messages(*(kind.__name__ for kind in kinds))


FAMILIES = re.findall(r"^### `([^`]+?):?`$", TROUBLESHOOTING, flags=re.MULTILINE)


def is_of(family: str, message: str) -> bool:
    return re.match(re.escape(family) + "[: ]", message) is not None


def is_quoted(message: str) -> bool:
    """Whether the page has the words of a message that no family begins."""
    page = " ".join(TROUBLESHOOTING.split())
    parts = [part.replace("(at", "").strip(" `:;,(") for part in message.split(HOLE)]
    return all(part in page for part in parts if len(part) > 7)


def test_every_refusal_is_explained():
    found = refusals()
    assert len(found) > 100
    unexplained = {
        message
        for message in found
        if not message.startswith(HOLE)  # which carries on the message of another refusal
        and not any(is_of(family, message) for family in FAMILIES)
        and not is_quoted(message)
    }
    assert not unexplained


def test_every_family_is_one_of_the_code():
    found = refusals()
    assert [family for family in FAMILIES if not any(is_of(family, message) for message in found)] == []
    assert len(FAMILIES) == len(set(FAMILIES)) > 20


def test_every_reason_why_a_block_cannot_idle_is_explained():
    reasons = messages("refuse", argument=1)
    assert len(reasons) > 20
    assert {reason for reason in reasons if not is_quoted(reason)} == set()


def test_every_warning_is_explained():
    warned = messages("warn")
    assert len(warned) > 2
    assert {message for message in warned if not is_quoted(message)} == set()


def test_refusals_that_nobody_explains_are_noticed():
    assert not any(is_of(family, "plann: no such thing as a plan") for family in FAMILIES)
    assert not is_quoted(f"`{HOLE}` is a reason that the page does not have")
