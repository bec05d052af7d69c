"""What is found in a model before anything is done to it."""

import idlefx
from tests.models.small import DEPTH, build, build_mixing, fingerprint, image_tokens, images


def test_every_block_of_a_small_vit_is_found(name, model, spec):
    table = [block for block in idlefx.inspect(model) if block.can_idle]
    tokens = image_tokens(model) + spec.prefix
    assert [block.path for block in table] == [f"blocks.{i}" for i in range(DEPTH)]
    assert [block.index for block in table] == list(range(DEPTH))
    assert {(block.tokens, block.width) for block in table} == {(tokens, model.embed_dim)}
    assert {block.prefix for block in table} == {tuple(range(spec.prefix))}
    assert {block.class_token for block in table} == {spec.class_position}
    heads = 1 if name.startswith("collision") else 3
    assert {(block.heads, block.head_width) for block in table} == {(heads, model.embed_dim // heads)}


def test_table_prints_a_line_per_block():
    lines = str(idlefx.inspect(build("registers"))).splitlines()
    for block in range(DEPTH):
        (line,) = (line for line in lines if f"blocks.{block}" in line)
        cells = line.split()
        assert {"41", "5", "48", "3"} <= set(cells)


def test_block_that_cannot_idle_says_why():
    model = build_mixing()
    table = list(idlefx.inspect(model, images(model, 2)))
    assert [block.can_idle for block in table] == [True, False, True, True]
    assert "conv1d" in table[1].refusal
    assert "conv1d" in str(idlefx.inspect(model, images(model, 2)))


def test_inspecting_leaves_the_model_untouched():
    model = build("distilled").train()
    before = fingerprint(model)
    idlefx.inspect(model)
    assert fingerprint(model) == before
