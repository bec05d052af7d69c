"""Timing dense against idling models. Imports pipeline and below; not deploy, training or zoo."""
