"""Attention over shared prompts as an operator: values and gradients under the mask, eagerly and compiled."""

import pytest
import torch
from common.lm.shared_attention import compile_packed
from common.lm.shared_prompts import SharedPrompts, pack

ROWS = [[1, 2, 3, 4], [1, 2, 5], [7, 8, 9], [7, 6], [1]]
GROUPS = [[0, 1], [2, 3], [4]]


def segments(query, key, value, query_ends, key_ends):
    """Of each segment q, k, v (heads, ., d), the probabilities, their sums; its causal mask ends at its last key."""
    groups = query.shape[1] // key.shape[1]
    for place in range(len(query_ends) - 1):
        rows, keys = slice(*query_ends[place : place + 2]), slice(*key_ends[place : place + 2])
        q, k, v = (
            query[rows].transpose(0, 1),
            *(x[keys].transpose(0, 1).repeat_interleave(groups, 0) for x in (key, value)),
        )
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]).logical_not()
        scores = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).masked_fill(hidden, -torch.inf)
        yield q, k, v, scores.softmax(-1), scores.logsumexp(-1)


@pytest.fixture
def on_cpu():
    """torch's varlen attention has a kernel for the CPU, in plain lines."""

    def forward(query, key, value, query_ends, key_ends, *_):
        every = list(segments(query, key, value, query_ends, key_ends))
        attended = torch.cat([(p @ v).transpose(0, 1) for _, _, v, p, _ in every])
        return attended, torch.cat([sums for *_, sums in every], 1), torch.zeros(2, dtype=torch.uint64)

    def backward(gradient, query, key, value, out, sums, query_ends, key_ends, *_):
        found = []
        for place, (q, k, v, p, _) in enumerate(segments(query, key, value, query_ends, key_ends)):
            rows = slice(*query_ends[place : place + 2])
            dout = gradient[rows].transpose(0, 1)
            ds = p * (dout @ v.transpose(1, 2) - (dout * out[rows].transpose(0, 1)).sum(-1, keepdim=True))
            dk, dv = ds.transpose(1, 2) @ q / q.shape[2] ** 0.5, p.transpose(1, 2) @ dout
            dk, dv = (one.unflatten(0, (key.shape[1], -1)).sum(1) for one in (dk, dv))
            found.append([one.transpose(0, 1) for one in (ds @ k / q.shape[2] ** 0.5, dk, dv)])
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    with torch.library._scoped_library("torch_attn", "FRAGMENT") as library:
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        yield


def attend(shared, query, key, value):
    return shared.attention(query, key, value)


@pytest.mark.parametrize("run", [attend, torch.compile(attend, backend="aot_eager", fullgraph=True)])
def test_values_and_gradients_are_those_under_the_mask(run, on_cpu):
    torch.manual_seed(0)
    shared = pack(ROWS, GROUPS, 4)
    states = [torch.randn(1, shared.tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    by_head = [one.transpose(1, 2) for one in states]
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head, shared.mask(), enable_gqa=True)
    weight = torch.randn(expected.shape).transpose(1, 2)
    wanted = torch.autograd.grad(expected.transpose(1, 2), states, weight)
    found = run(shared, *states)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    torch.testing.assert_close(torch.autograd.grad(found, states, weight), wanted)


def test_another_packing_is_no_other_graph(on_cpu):
    """Batches differ in their lengths: compiled for two of them, the layers are compiled for all."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attend, backend=count, fullgraph=True)
    longer = [*ROWS, [3, 4, 5, 6, 7, 8], [3, 4, 5, 9]], [*GROUPS, [5, 6]]
    for rows, groups in ((ROWS, GROUPS), longer, (ROWS[:3], [[0, 1], [2]])):
        shared = pack(rows, groups, 6)
        compiled(shared, *(torch.randn(1, shared.tokens, heads, 8) for heads in (4, 2, 2)))
    assert len(graphs) == 2


class Attention(torch.nn.Module):
    def forward(self, states, **named):
        return named["prefix_seg_info"].attention(*(states.unflatten(2, (2, -1)) for _ in range(3))).flatten(2)


class Layer(torch.nn.Module):
    """A decoder layer as Unsloth has it: compiled, but for one that is given a prefix or lengths."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.graphs = Attention(), []
        self.compiled = torch.compile(self.stock, backend=self.count)

    def count(self, graph, _):
        self.graphs.append(graph)
        return graph.forward

    def stock(self, states, **named):
        return states + self.self_attn(states=states.sin(), **named)

    def forward(self, states, **named):
        plain = named.get("prefix_seg_info") is not None or named.get("packed_seq_lengths") is not None
        return (self.stock if plain else self.compiled)(states, **named)


def test_a_layer_of_packed_rows_is_compiled_whole(on_cpu):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, alone = Layer(), Layer()
    compile_packed([layer], SharedPrompts)
    for rows, groups in ((ROWS, GROUPS), (ROWS[:3], [[0, 1], [2]])):
        shared = pack(rows, groups, 6)
        states = torch.randn(1, shared.tokens, 16)
        given = {"prefix_seg_info": shared, "packed_seq_lengths": shared.lengths}
        torch.testing.assert_close(layer(states, **given), alone(states, **given))
    assert len(layer.graphs) == 2  # one of the first batch, one of every length
    assert alone.graphs == []


def test_the_operator_fits_its_description(on_cpu):
    shared = pack(ROWS, GROUPS, 4)
    states = (torch.randn(shared.tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    copies = shared.keys.of, shared.keys.first, shared.keys.other, shared.keys.other_of
    ends = shared.query_ends, shared.key_ends, shared.longest_query, shared.longest_key
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.recipes.shared_attention, (*states, *copies, *ends, None), test_utils=tests)
