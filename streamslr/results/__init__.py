"""Results of a run, read from the folder that it wrote: inspect, report, verify, evaluate, tasks, export."""
