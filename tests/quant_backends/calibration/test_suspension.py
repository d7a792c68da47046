"""Passes that wait at doors: the model's own code runs, one pass at a time, and nothing of it is left behind."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from lmms_plugin.quant_backends.calibration.suspension import Suspended, doors, in_a_pass


class Chain(nn.Module):
    """Three blocks with the model's own code between them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x) + number
        return x


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain().eval()


def gate(chain):
    return doors({str(index): block for index, block in enumerate(chain.blocks)})


@torch.no_grad()
def test_many_passes_wait_for_each_block_and_end_like_plain_ones(chain):
    samples = [torch.randn(2, 4) for _ in range(5)]
    expected = [chain(x) for x in samples]
    results = {}
    order = []
    with gate(chain) as forwards:
        passes = [Suspended(lambda i=i, x=x: results.__setitem__(i, chain(x))) for i, x in enumerate(samples)]
        for one in passes:
            one.advance()
        for index in range(3):
            for number, one in enumerate(passes):
                assert one.call.name == str(index)
                order.append((index, number))
                one.advance(forwards[one.call.name](*one.call.args))
        assert all(one.finished and one.call is None for one in passes)
    assert order == sorted(order)
    assert all(torch.equal(results[index], value) for index, value in enumerate(expected))


def test_outside_of_passes_modules_work_as_always_and_later_too(chain):
    x = torch.randn(2, 4)
    expected = chain(x)
    with gate(chain):
        assert torch.equal(chain(x), expected)
        assert not in_a_pass()
    assert torch.equal(chain(x), expected)
    assert not any("forward" in vars(block) for block in chain.blocks)


def test_a_forward_of_the_modules_own_comes_back(chain):
    own = chain.blocks[1].forward = lambda x: 2 * x
    with gate(chain) as forwards:
        assert forwards["1"] is own
        assert chain.blocks[1].forward is not own
    assert chain.blocks[1].forward is own


def test_hooks_run_within_the_pass_and_see_what_the_driver_hands_over(chain):
    seen = []
    chain.blocks[0].register_forward_hook(lambda _, args, output: seen.append((in_a_pass(), args[0], output)))
    x, handed = torch.randn(2, 4), torch.full((2, 4), 7.0)
    with gate(chain):
        one = Suspended(lambda: chain(x))
        one.advance()
        one.advance(handed)
        one.close()
    ((inside, given, output),) = seen
    assert inside
    assert given is x
    assert output is handed


def test_an_error_of_the_pass_reaches_whoever_waits_for_it(chain):
    def fail():
        raise KeyError("between two blocks")

    with gate(chain), pytest.raises(KeyError, match="between two blocks"):
        Suspended(fail).advance()


def test_a_pass_is_without_gradients(chain):
    modes = []
    one = Suspended(lambda: modes.append(torch.is_grad_enabled()))
    one.advance()
    assert modes == [False]
    assert one.finished
    with pytest.raises(RuntimeError, match="is over"):
        one.advance()


def test_closed_passes_unwind_and_hold_nothing(chain):
    unwound = []
    before = threading.active_count()

    def run(x):
        try:
            chain(x)
        except Exception:  # what models do at times must not swallow the unwinding
            unwound.append("swallowed")
        finally:
            unwound.append("left")

    x = torch.randn(2, 4)
    held = weakref.ref(x)
    with gate(chain):
        started, fresh = Suspended(lambda x=x: run(x)), Suspended(lambda: run(None))
        started.advance()
        del x
        started.close()
        fresh.close()
        started.close()
    gc.collect()
    assert unwound == ["left"]
    assert held() is None
    assert threading.active_count() == before


@torch.no_grad()
def test_a_block_gone_by_is_not_held(chain):
    """What goes into a block may go as soon as the pass is at the next one."""
    with gate(chain) as forwards:
        one = Suspended(lambda: chain(torch.randn(2, 4)))
        one.advance()
        one.advance(forwards["0"](one.call.args[0]))
        held = weakref.ref(one.call.args[0])
        assert held() is not None
        one.advance(forwards["1"](one.call.args[0]))
        gc.collect()
        assert held() is None
        one.close()
