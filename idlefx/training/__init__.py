"""Fine-tuning with the dense model as teacher. Imports pipeline and below; not bench, deploy or zoo."""
