"""Compiled and packaged forms of a converted model. Imports pipeline and below; not bench, training or zoo."""
