"""Tests, and what they share: `oracles` say what is right, `models` are what is converted, `support` helps."""
