"""The compatibility table: many models, each checked. Imports pipeline and below; not bench, deploy or training."""
