"""A model's modules and weights are those that torch lists, each once and in its order."""

import torch
from tiny import model as tiny_model
from torch import nn

from specdec_fast.modules import buffers_of, modules_of, parameter_count, parameters_of


def same(ours, theirs):
    theirs = list(theirs)
    return len(ours) == len(theirs) and all(one is other for one, other in zip(ours, theirs, strict=True))


def listed(model):
    return (
        same(modules_of(model), model.modules())
        and same(parameters_of(model), model.parameters())
        and same(buffers_of(model), model.buffers())
    )


class Shared(nn.Module):
    """A block that stands in two places, a weight that is two modules', a place without a module."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.first = nn.ModuleList([nn.Sequential(nn.Linear(3, 4), block), nn.ReLU()])
        self.again = block
        self.nothing = None
        self.register_module("absent", None)
        self.register_parameter("none", None)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = block[0].weight
        self.register_buffer("own", torch.zeros(2))
        self.own_too = nn.Module()
        self.own_too.register_buffer("same", self.own)


def test_what_is_shared_counts_once():
    target = tiny_model()
    assert listed(Shared()) and listed(target)
    assert parameter_count(Shared()) == sum(p.numel() for p in Shared().parameters())
    assert parameter_count(target) == target.num_parameters()


def test_a_model_of_four_bits_counts_for_itself():
    class Packed(nn.Module):
        is_loaded_in_4bit = True

        def num_parameters(self):
            return 12

    assert parameter_count(Packed()) == 12
