"""Compresses a model: context, plan, the block loop, the journal."""
