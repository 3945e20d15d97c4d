"""The run: its context, plan, block loop and journal."""
