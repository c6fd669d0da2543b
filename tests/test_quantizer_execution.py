"""How quantizers run: gradients, layouts, memory, autocast, tracing, compiling, copying."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qmimic_d2.modeling.quantizer import ClampQuantizer, PowerOfTwoQuantizer, UniformQuantizer

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CODE_QUANTIZERS = [UniformQuantizer, PowerOfTwoQuantizer]
QUANTIZER_CLASSES = [*CODE_QUANTIZERS, ClampQuantizer]
INF = math.inf

# Every class, unbounded and bounded, plain and signed.
QUANTIZERS = [
    quantizer_class(0.5, num_codes, signed=signed)
    for quantizer_class in QUANTIZER_CLASSES
    for num_codes in (0, 6)
    for signed in (False, True)
]


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0, equal_nan=True)


def codes_by_bucket(quantizer, x):
    """Q(x) by torch.bucketize, whose right edges are closed as the definition's are."""
    if isinstance(quantizer, ClampQuantizer):
        top = INF if quantizer.max_value is None else quantizer.max_value
        return x.clamp(-top if quantizer.signed else 0.0, top)
    count = quantizer.num_codes or 60
    codes = quantizer.dequantize(torch.arange(count), torch.float64)
    indices = torch.bucketize(x.double().abs(), (codes[1:] + codes[:-1]) / 2)
    sign = x.double().sign()
    return (codes[indices] * (sign if quantizer.signed else sign.clamp(min=0))).to(x.dtype)


# ------------------------------------------------------------------------------------ gradients


def gradient(quantizer, x):
    x = x.clone().requires_grad_()
    weight = torch.arange(1, x.numel() + 1).to(x.dtype).view_as(x)
    (grad,) = torch.autograd.grad(quantizer(x), x, weight)
    assert grad.dtype == x.dtype
    return grad / weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer_class", QUANTIZER_CLASSES)
def test_gradient_is_the_relus_own(quantizer_class, dtype):
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-6, 0.25, 0.5, 0.75, 100.0, INF], dtype=dtype)
    assert gradient(quantizer_class(), x).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert gradient(quantizer_class(signed=True), x).tolist() == [1] * 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [0.5, 0.3, 0.7, 1.1])
@pytest.mark.parametrize(
    "quantizer_class, multiple", [(UniformQuantizer, 9), (PowerOfTwoQuantizer, 256), (ClampQuantizer, 9)]
)
def test_gradient_saturates_strictly_above_the_outermost_code(quantizer_class, multiple, stride, dtype):
    quantizer = quantizer_class(stride, 10)
    top = torch.tensor(stride * multiple, dtype=dtype)  # the code as this dtype has it
    assert quantizer.max_value == stride * multiple
    above = torch.nextafter(top, torch.tensor(INF, dtype=dtype))
    x = torch.stack([top / 2, top, above, 2 * top, -top])
    assert gradient(quantizer, x).tolist() == [1, 1, 0, 0, 0]
    x = torch.cat([x, -above[None]])
    signed = quantizer_class(stride, 10, signed=True)
    assert gradient(signed, x).tolist() == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("num_codes", [0, 4])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("quantizer_class", QUANTIZER_CLASSES)
def test_second_derivative(quantizer_class, signed, num_codes):
    # d/dw of the gradient of sum(w Q(x)) is the mask
    quantizer = quantizer_class(1.0, num_codes, signed=signed)
    x = torch.tensor([-9.0, 0.4, 2.0, 9.0], requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    (grad,) = torch.autograd.grad((quantizer(x) * weight).sum(), x, create_graph=True)
    grad.sum().backward()
    bounded = num_codes > 0
    assert weight.grad.tolist() == [float(signed and not bounded), 1, 1, float(not bounded)]


def test_no_gradient_flows_without_grad_mode_or_from_quantize():
    x = torch.randn(4, 6, requires_grad=True)
    for quantizer in (UniformQuantizer(), PowerOfTwoQuantizer()):
        with torch.no_grad():
            assert not quantizer(x).requires_grad
        for layout in (x, x[:, ::2]):
            assert not quantizer.quantize(layout).requires_grad


# ------------------------------------------------------------------------------------ layouts


def layouts():
    """Feature maps in every memory layout, by name."""
    base = torch.randn(2, 3, 5, 7) * 2
    yield "contiguous", base
    yield "channels_last", base.to(memory_format=torch.channels_last)
    yield "one_image_of_channels_last", base.to(memory_format=torch.channels_last)[1:]
    yield "transposed", base.transpose(1, 3)
    yield "strided", base[:, :, ::2, 1::3]
    yield "cropped", base[..., 1:, :-1]
    yield "expanded", base[:, :1].expand(2, 4, 5, 7)
    yield "expanded_in_front", base[0].expand(3, 3, 5, 7)
    yield "one_channel", base[:, 1:2]
    yield "behind_an_offset", base.flatten()[11:]
    yield "channels_last_3d", torch.randn(1, 2, 3, 2, 4).to(memory_format=torch.channels_last_3d)
    yield "scalar", torch.tensor(1.3)
    yield "scalar_of_a_map", base[1, 2, 3, 4]
    yield "empty", torch.empty(0)
    yield "no_image", torch.empty(0, 3, 5, 7)
    yield "no_row", torch.empty(2, 3, 0, 7)


LAYOUTS = [name for name, _ in layouts()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, dtype):
    x = dict(layouts())[layout]
    strides = x.stride()
    x = x.to(dtype).as_strided(x.shape, strides) if layout.startswith("expanded") else x.to(dtype)
    is_dense = torch.empty_like(x).stride() == x.stride()
    before = x.clone()
    for quantizer in QUANTIZERS:
        leaf = x.detach().requires_grad_()
        y = quantizer(leaf)
        assert torch.equal(y, codes_by_bucket(quantizer, x)), quantizer
        assert y.shape == x.shape and y.dtype == dtype
        assert y.stride() == x.stride() if is_dense else y.is_contiguous(), quantizer
        (grad,) = torch.autograd.grad(y, leaf, torch.full_like(y, 3.0))
        assert grad.shape == x.shape
        top = INF if quantizer.max_value is None else quantizer.max_value
        passes = (x.abs() <= top) if quantizer.signed else (x > 0) & (x <= top)
        assert torch.equal(grad, passes.to(dtype) * 3), quantizer
        assert torch.equal(x, before) and leaf._version == 0
        if x.numel():
            assert y.data_ptr() != x.data_ptr(), "the result must not share the input's memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_map(dtype):
    x = (torch.randn((1 << 17) + 17) * 3).to(dtype)
    for quantizer in QUANTIZERS:
        assert torch.equal(quantizer(x), codes_by_bucket(quantizer, x)), quantizer


def test_maps_of_inference_mode():
    with torch.inference_mode():
        x = torch.randn(2, 3, 5, 7) * 2
        for quantizer in QUANTIZERS:
            assert torch.equal(quantizer(x), codes_by_bucket(quantizer, x))


# ------------------------------------------------------------------------------------ memory


class Allocations(TorchDispatchMode):
    """Names of the operations that return memory of at least ``num_bytes`` which they were not given."""

    def __init__(self, num_bytes):
        super().__init__()
        self.num_bytes = num_bytes
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in self.tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in self.tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given and storage.nbytes() >= self.num_bytes:
                self.operations.append(str(function))
        return result

    @staticmethod
    def tensors(tree):
        return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def test_allocations_are_counted():
    x = torch.ones(100)
    with Allocations(x.nbytes) as allocations:
        (x + 1).mul_(2).view(10, 10).sum()
    assert allocations.operations == ["aten.add.Tensor"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_one_allocation_forward_and_one_backward(quantizer, dtype, memory_format):
    x = torch.randn(2, 64, 50, 51).to(dtype).to(memory_format=memory_format).requires_grad_()
    with Allocations(x.nbytes) as forward:
        y = quantizer(x)
    if isinstance(quantizer, ClampQuantizer):
        assert len(forward.operations) == 1, forward.operations
    elif isinstance(quantizer, UniformQuantizer):
        # the codes; the magnitude of a signed map; both forms of a 16-bit map
        allowed = 1 + quantizer.signed + 2 * (dtype == torch.bfloat16)
        assert len(forward.operations) == allowed, forward.operations
    grad = torch.ones_like(y)
    with Allocations(x.nbytes) as backward:
        torch.autograd.grad(y, x, grad)
    assert len(backward.operations) == int(quantizer.has_gradient_mask), backward.operations


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_nothing_is_saved_but_the_map_itself(quantizer):
    saved = []
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantizer(x)
    expected = [x.data_ptr()] if quantizer.has_gradient_mask else []
    assert [tensor.data_ptr() for tensor in saved] == expected
    assert sum(tensor.nbytes for tensor in saved) <= x.nbytes


# ------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_under_autocast(quantizer):
    conv = nn.Conv2d(3, 4, 3)
    image = torch.randn(2, 3, 9, 9) * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = conv(image)
        y = quantizer(features)
        full = quantizer(image)
        loss = y.float().sum()
    assert features.dtype == y.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert torch.equal(y, codes_by_bucket(quantizer, features.detach()))
    assert torch.equal(full, quantizer(image))
    loss.backward()
    assert conv.weight.grad.dtype == torch.float32 and conv.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------ trace, compile


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_a_trace_equals_and_is_saved(quantizer, dtype):
    example = (torch.randn(2, 3, 5, 7) * 2).to(dtype)
    traced = torch.jit.trace(quantizer, example)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    powers = 2.0 ** torch.arange(-8, 127).to(dtype)
    up, down = torch.tensor(INF, dtype=dtype), torch.tensor(-INF, dtype=dtype)
    special = torch.cat([powers, powers * 1.5, torch.tensor([math.nan, INF, -INF, -0.0, 1e30, 1e-40], dtype=dtype)])
    special = torch.cat([special, -special, torch.nextafter(special, up), torch.nextafter(special, down)])
    other_size = torch.randn(1, 3, 8, 13).to(dtype) * 2
    for x in (example, other_size, special, torch.empty(0, 3, 1, 1, dtype=dtype)):
        before = x.clone()
        assert_equal(traced(x), quantizer(x))
        assert_equal(loaded(x), quantizer(x))
        assert_equal(x, before)


def compile_backends():
    """ "inductor" where torch finds a C++ compiler."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception:  # not there, or under another name in another torch
        return ["aot_eager"]
    return ["aot_eager", "inductor"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", compile_backends())
def test_compiled_equals_eager(backend):
    quantizers = QUANTIZERS + [UniformQuantizer(0.3), PowerOfTwoQuantizer(0.3, 5)]

    def quantize_all(x):
        return [quantizer(x) for quantizer in quantizers]

    torch._dynamo.reset()
    compiled = torch.compile(quantize_all, backend=backend, fullgraph=True)
    special = torch.cat([torch.arange(-8, 50) / 4 * 0.5, torch.tensor([math.nan, INF, -INF, -0.0, 1e30, 1e-40])])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.cat([torch.randn(448) * 2, special]).to(dtype).requires_grad_()
        before = x.detach().clone()
        for quantizer, ours, theirs in zip(quantizers, compiled(x), quantize_all(x)):
            assert_equal(ours, theirs)
            # at NaN a clipped ReLU's gradient is not defined
            grad = torch.full_like(x, 3.0).masked_fill(x.isnan(), 0.0)
            grads = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (ours, theirs)]
            assert_equal(*grads)
        assert_equal(x, before)


# ------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_copies(quantizer):
    x = torch.randn(50) * 3
    for other in (copy.copy(quantizer), copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert other is not quantizer and repr(other) == repr(quantizer)
        assert torch.equal(other(x), quantizer(x))


def test_a_quantizer_moves_and_switches_modes_without_effect():
    x = torch.randn(50) * 3
    quantizer = UniformQuantizer(0.5)
    expected = quantizer(x)
    for changed in (quantizer.eval(), quantizer.half(), quantizer.to("cpu"), quantizer.train()):
        assert torch.equal(changed(x), expected)
