"""A pretended CUDA device for machines without one. `device.py` says how it works and what it shows.

| file | what it is |
|---|---|
| device.py | PretendedGpu: the device while it is entered; places of tensors, stand-ins for torch.cuda |
| modes.py | the two modes of torch through which it sees functions and operators |
| operators.py | what it knows of aten's operators beside their cost |
| allocator.py | model of the caching allocator, with expandable segments |
| cost.py | what operators cost, rates of a card, costs of a phase |
| streams.py | streams and events, and the check that work on them is ordered |
| ranks.py | ranks of which one is there; the bytes that they would send |
| block.py | one block of a model of any shape through the run's own code, without its weights |
"""

from pretended_gpu.cost import Card, Cost
from pretended_gpu.device import Answers, PretendedGpu
from pretended_gpu.modes import DeviceMixError
from pretended_gpu.streams import StreamRaceError

__all__ = ["Answers", "Card", "Cost", "DeviceMixError", "PretendedGpu", "StreamRaceError"]
