"""All layers of a decode step in one launch: its phases, one by one as the interpreter runs them, against the
composition; when it is taken; and on a GPU that its barriers give the same bits.
"""

import numerics
import pytest
import torch
from kernel_cases import DEVICE, EPS, INTERPRETED, ORACLE, TORCH, TRITON, WITHOUT_FP16, assert_same
from test_kernel_decode_layer import MODELS, layer, weights_of

from kernels import LayerWeights, decode_layers, launch_config, with_ops
from kernels.decode_layers import _Shape

pytestmark = pytest.mark.usefixtures("poison_empty")


def stack(count=2, **sizes):
    """The arguments of decode_layers, by name: `count` layers of different weights and caches."""
    layers = [layer(**sizes) for _ in range(count)]
    first = layers[0]
    return dict(
        x=first["x"], layers=[one["weights"] for one in layers],
        key_caches=[one["key_cache"] for one in layers], value_caches=[one["value_cache"] for one in layers],
        lengths=first["lengths"], cos=first["cos"], sin=first["sin"],
    )  # fmt: skip


def run(function, arguments, **more):
    """(out, key caches, value caches), with copies of the caches of arguments."""
    copies = {name: [cache.clone() for cache in arguments[name]] for name in ("key_caches", "value_caches")}
    out = function(**{**arguments, **copies}, eps=EPS, **more)
    return [out, *copies["key_caches"], *copies["value_caches"]]


def doubled(arguments):
    lists = {name: [one.double() for one in arguments[name]] for name in ("key_caches", "value_caches")}
    layers = [LayerWeights(*(weight.double() for weight in one)) for one in arguments["layers"]]
    return {**arguments, **lists, "x": arguments["x"].double(), "layers": layers}


def agree(arguments):
    """Holds the output and all caches to the contract -> the kernel's results."""
    ours = run(decode_layers.decode_layers, arguments, by_phase=True)
    base = run(ORACLE.decode_layers, arguments, ops=ORACLE)
    truth = run(ORACLE.decode_layers, doubled(arguments), ops=ORACLE)
    for index, three in enumerate(zip(ours, base, truth, strict=True)):
        numerics.check("decode_layers", "out" if index == 0 else f"cache {index}", *three)
    return ours


@pytest.mark.parametrize("dtype", WITHOUT_FP16)
@pytest.mark.parametrize("lengths, new", [((140,), 1), ((9, 33), 1), ((40, 17, 300), 3)])
def test_phases_are_the_composition(lengths, new, dtype):
    agree(stack(lengths=lengths, new=new, capacity=300, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 3])
def test_more_splits_than_are_added_at_a_time(rows):
    agree(stack(lengths=(1200, *[640] * (rows - 1)), capacity=1200))


@pytest.mark.parametrize("hidden, ffn", [(33, 17), (97, 257)])
def test_any_width(hidden, ffn):
    agree(stack(lengths=(30, 12), hidden=hidden, ffn=ffn))


def test_tables_of_all_rows():
    arguments = stack(1, lengths=(9, 9))
    shared = {name: arguments[name][0] for name in ("cos", "sin")}
    each = {name: table.expand(2, -1, -1) for name, table in shared.items()}
    assert_same(agree({**arguments, **shared}), agree({**arguments, **each}))


def test_a_row_does_not_depend_on_the_other_rows_or_on_the_capacity():
    """One row adds its splits in the phase of o, several in one of their own."""
    arguments = stack(1, lengths=(200, 31), capacity=384)
    together = run(decode_layers.decode_layers, arguments, by_phase=True)[0]
    for row in range(2):
        caches = {
            name: [one[row : row + 1, :200].contiguous() for one in arguments[name]]
            for name in ("key_caches", "value_caches")
        }
        names = ("x", "lengths", "cos", "sin")
        alone = {**arguments, **caches, **{name: arguments[name][row : row + 1] for name in names}}
        assert torch.equal(run(decode_layers.decode_layers, alone, by_phase=True)[0], together[row : row + 1])


def test_every_phase_of_the_135m_model_fits_the_programs_and_their_registers():
    """And wider models do not: they are launched layer by layer."""
    held = {}
    for name, (hidden, ffn, heads, key_heads, head_dim) in MODELS.items():
        shape = _Shape(hidden, ffn, heads, key_heads, head_dim)
        groups = shape.groups(132)
        units = {"QKV_GROUPS": (heads + 2 * key_heads) * head_dim, "O_GROUPS": hidden, "GATE_GROUPS": 2 * ffn}
        assert all(-(-count // (8 * groups[key])) <= 132 for key, count in units.items())
        held[name] = shape.held(132, 2)
    assert held["135M"] == 4 * 8 * 768 * 2 <= decode_layers.HELD_BYTES
    assert min(held["360M"], held["1.7B"]) > decode_layers.HELD_BYTES
    with pytest.raises(ValueError, match="narrow enough"):  # for the few programs of the interpreter
        run(decode_layers.decode_layers, stack(1, lengths=(9,), hidden=576, ffn=1536), by_phase=True)


def test_it_is_taken_where_the_launch_table_says_so(monkeypatch):
    arguments, calls = stack(lengths=(9,)), []

    def counted(*args, **more):
        calls.append("joined")
        return ORACLE.decode_layers(*args, **more, ops=TORCH)

    monkeypatch.setattr(decode_layers, "decode_layers", counted)
    plain = run(TRITON.decode_layers, arguments, ops=TRITON)
    assert not calls
    name = launch_config.architecture(DEVICE)
    monkeypatch.setattr(launch_config, "ONE_LAUNCH", (name,))
    assert torch.equal(run(TRITON.decode_layers, arguments, ops=TRITON)[0], run(counted, arguments)[0])
    assert calls == ["joined", "joined"]
    torch.testing.assert_close(plain, run(counted, arguments), rtol=1e-4, atol=1e-4)
    calls.clear()
    for op in ("swiglu", "decode_layer"):  # the launch would never call the replacement
        backend = with_ops(TRITON, **{op: TORCH})
        run(backend.decode_layers, arguments, ops=backend)
    run(TRITON.decode_layers, {**arguments, "layers": [], "key_caches": [], "value_caches": []}, ops=TRITON)
    seventeen = stack(lengths=(9,) * 17)
    run(TRITON.decode_layers, seventeen, ops=TRITON)
    other = [arguments["layers"][0], weights_of(96, 176, 3, 1, 32, torch.float32)]
    run(TRITON.decode_layers, {**arguments, "layers": other}, ops=TRITON)
    assert not calls


def test_what_it_cannot_take_is_refused():
    arguments = stack(lengths=(9,))
    for change, wanted in (
        ({"layers": [], "key_caches": [], "value_caches": []}, "1 to 16 rows, and layers"),
        (stack(1, lengths=(9,) * 17), "1 to 16 rows"),
        ({"key_caches": [cache[:, :39] for cache in arguments["key_caches"]]}, "value cache|of one shape"),
    ):
        with pytest.raises(ValueError, match=wanted):
            run(decode_layers.decode_layers, {**arguments, **change}, by_phase=True)


@pytest.mark.skipif(
    INTERPRETED or launch_config.architecture(DEVICE) not in launch_config.DEPENDENT_LAUNCH,
    reason="a barrier of the grid: the interpreter runs one program after the other; sm_90 or newer",
)
@pytest.mark.parametrize("lengths, new", [((900,), 1), ((900, 40, 333, 7, 1000), 1), ((30, 700), 8)])
@pytest.mark.parametrize("dtype", WITHOUT_FP16)
def test_one_launch_has_the_bits_of_its_phases(lengths, new, dtype):
    arguments = stack(6, lengths=lengths, new=new, capacity=1024, dtype=dtype)
    expected = run(decode_layers.decode_layers, arguments, by_phase=True)
    for _ in range(200):
        assert_same(run(decode_layers.decode_layers, arguments), expected)
