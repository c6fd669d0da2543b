"""Quantizers against their definition: values, codes, bad input, the config."""

import math
from fractions import Fraction

import pytest
import torch
from detectron2.config import get_cfg

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.modeling.quantizer import (
    QUANTIZER_REGISTRY,
    ClampQuantizer,
    CodeQuantizer,
    PowerOfTwoQuantizer,
    Quantizer,
    UniformQuantizer,
    build_code_quantizer,
    build_quantizer,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CODE_QUANTIZERS = [UniformQuantizer, PowerOfTwoQuantizer]
NAN, INF = math.nan, math.inf


# ------------------------------------------------------------------------------------ the definition


def codes_around(quantizer, f):
    """Adjacent codes of D that enclose f >= 0, as fractions; to the end of D where it has one near."""
    stride = Fraction(quantizer.stride)
    if isinstance(quantizer, PowerOfTwoQuantizer):
        codes = [Fraction(0), stride]
        while codes[-1] < 2 * f:
            codes.append(2 * codes[-1])
        codes.append(2 * codes[-1])
        return codes[: quantizer.num_codes or None]
    first = max(0, math.floor(f / stride) - 1)
    last = first + 4
    if quantizer.num_codes:
        last = min(last, quantizer.num_codes - 1)
        first = min(first, last)
    return [index * stride for index in range(first, last + 1)]


def nearest_code(quantizer, value):
    """Q(f) = b if (a + b) / 2 < f <= (b + c) / 2, in exact arithmetic."""
    if math.isnan(value):
        return NAN
    if value < 0:
        return -nearest_code(quantizer, -value) if quantizer.signed else 0.0
    if math.isinf(value):
        return INF if quantizer.max_value is None else quantizer.max_value
    f = Fraction(value)
    codes = codes_around(quantizer, f)
    for index, code in enumerate(codes):
        is_above_lower = index == 0 or (codes[index - 1] + code) / 2 < f
        is_below_upper = index + 1 == len(codes) or f <= (code + codes[index + 1]) / 2
        if is_above_lower and is_below_upper:
            return float(code)
    raise AssertionError(f"{value} is between no two midpoints of {quantizer}")


def adversarial_values(quantizer, dtype):
    """Midpoints, codes, their neighbours in the dtype, huge and tiny values, and random ones."""
    small = torch.arange(0, 41)
    edges = torch.tensor([2**k + d for k in (8, 11, 16, 20, 22, 23, 24, 25, 30) for d in (-1, 0, 1)])
    multiples = torch.cat([small, edges]).double()
    values = torch.cat([multiples, multiples + 0.5, 1.5 * 2.0 ** torch.arange(-3, 31).double()])
    values = (values * quantizer.stride).to(dtype)
    values = values[values.isfinite()]
    up, down = torch.tensor(INF, dtype=dtype), torch.tensor(-INF, dtype=dtype)
    finfo = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, INF, NAN, finfo.tiny, finfo.tiny / 2, finfo.eps], dtype=dtype)
    subnormal = torch.nextafter(torch.zeros((), dtype=dtype), up)[None]
    noise = (torch.randn(60, dtype=torch.float64) * 5 * quantizer.stride).to(dtype)
    positive = [values, torch.nextafter(values, up), torch.nextafter(values, down), special, subnormal, noise]
    positive = torch.cat(positive)
    return torch.cat([positive, -positive])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("num_codes", [0, 2, 16])
@pytest.mark.parametrize("stride", [1.0, 0.5, 2.0**-4])
@pytest.mark.parametrize("quantizer_class", CODE_QUANTIZERS)
def test_values_follow_the_definition(quantizer_class, stride, num_codes, signed, dtype):
    quantizer = quantizer_class(stride, num_codes, signed=signed)
    x = adversarial_values(quantizer, dtype)
    expected = torch.tensor([nearest_code(quantizer, float(v)) for v in x], dtype=torch.float64).to(dtype)
    y = quantizer(x)
    assert y.dtype == dtype
    wrong = ~((y == expected) | (y.isnan() & expected.isnan()))
    assert not wrong.any(), f"x, Q(x), expected: {x[wrong]}, {y[wrong]}, {expected[wrong]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer_class", CODE_QUANTIZERS)
@pytest.mark.parametrize("stride", [0.1, 0.3, 1.7])
def test_values_of_a_stride_that_is_no_binary_fraction(stride, quantizer_class, dtype):
    # a midpoint is no float then; entries within rounding of one may go either way
    quantizer = quantizer_class(stride)
    x = (torch.rand(500, dtype=torch.float64) * 40 * stride).to(dtype)
    for value, y in zip(x.tolist(), quantizer(x).tolist()):
        low, high = (nearest_code(quantizer, value * (1 + d)) for d in (-1e-6, 1e-6))
        eps = torch.finfo(dtype).eps
        assert min(abs(y - low), abs(y - high)) <= eps * abs(high), (value, y, low, high)


@pytest.mark.parametrize(
    "quantizer, expected",
    [
        # the codes of -1.5, -0.5, 0, 0.5, 0.51, 1.5, 1.51, 2.5, 3, 3.01, 9
        (UniformQuantizer(), [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 9]),
        (UniformQuantizer(1.0, 3), [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]),
        (UniformQuantizer(signed=True), [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 9]),
        (UniformQuantizer(0.5, 4, signed=True), [-1.5, -0.5, 0, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]),
        (PowerOfTwoQuantizer(), [0, 0, 0, 0, 1, 1, 2, 2, 2, 4, 8]),
        (PowerOfTwoQuantizer(1.0, 3), [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]),
        (PowerOfTwoQuantizer(signed=True), [-1, 0, 0, 0, 1, 1, 2, 2, 2, 4, 8]),
        (ClampQuantizer(), [0, 0, 0, 0.5, 0.51, 1.5, 1.51, 2.5, 3, 3.01, 9]),
        (ClampQuantizer(1.0, 3), [0, 0, 0, 0.5, 0.51, 1.5, 1.51, 2, 2, 2, 2]),
        (ClampQuantizer(signed=True), [-1.5, -0.5, 0, 0.5, 0.51, 1.5, 1.51, 2.5, 3, 3.01, 9]),
        (ClampQuantizer(1.0, 2, signed=True), [-1, -0.5, 0, 0.5, 0.51, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_values_by_hand(quantizer, expected):
    x = torch.tensor([-1.5, -0.5, 0, 0.5, 0.51, 1.5, 1.51, 2.5, 3, 3.01, 9])
    assert torch.equal(quantizer(x), torch.tensor(expected, dtype=torch.float32))


def test_a_half_goes_down_where_torch_round_goes_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert UniformQuantizer()(x).tolist() == [0, 1, 2, 3]
    assert torch.round(x).tolist() == [0, 2, 2, 4]


def test_16_bit_maps_are_coded_by_their_exact_value():
    # x / s in 16 bits would be rounded onto midpoints
    quantizer = UniformQuantizer(1 / 3)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.linspace(0, 8, 200).to(dtype)
        assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))
        assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


@pytest.mark.parametrize("quantizer", [UniformQuantizer(1.0, 4), PowerOfTwoQuantizer(1.0, 4), ClampQuantizer(1.0, 4)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_and_infinity_saturates(quantizer, signed, dtype):
    quantizer = type(quantizer)(1.0, 4, signed=signed)
    y = quantizer(torch.tensor([NAN, INF, -INF], dtype=dtype)).tolist()
    assert math.isnan(y[0])
    assert y[1:] == [quantizer.max_value, -quantizer.max_value if signed else 0]


# ------------------------------------------------------------------------------------ codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("num_codes", [0, 5])
@pytest.mark.parametrize("stride", [0.25, 0.3])
@pytest.mark.parametrize("quantizer_class", CODE_QUANTIZERS)
def test_dequantize_inverts_codes(quantizer_class, stride, num_codes, signed, dtype):
    quantizer = quantizer_class(stride, num_codes, signed=signed)
    x = torch.cat([torch.randn(300) * 3, torch.zeros(1), torch.tensor([1e3, -1e3])]).to(dtype)
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int64 and codes.shape == x.shape
    assert torch.equal(quantizer.dequantize(codes, dtype), quantizer(x))
    if num_codes:
        assert codes.max() == 4 and codes.min() == (-4 if signed else 0)


def test_codes_by_hand():
    x = torch.tensor([[-9.0, -0.2, 0.0, 0.26], [0.5, 1.0, 2.1, 9.0]])
    assert UniformQuantizer(0.5).codes(x).tolist() == [[0, 0, 0, 1], [1, 2, 4, 18]]
    assert UniformQuantizer(0.5, 4, signed=True).codes(x).tolist() == [[-3, 0, 0, 1], [1, 2, 3, 3]]
    assert PowerOfTwoQuantizer(0.5).codes(x).tolist() == [[0, 0, 0, 1], [1, 2, 3, 5]]
    assert PowerOfTwoQuantizer(0.5, 4, signed=True).codes(x).tolist() == [[-3, 0, 0, 1], [1, 2, 3, 3]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_dequantize_takes_every_integer_type(dtype):
    codes = torch.tensor([0, 1, 2, 3], dtype=dtype)
    assert UniformQuantizer(0.5).dequantize(codes).tolist() == [0, 0.5, 1, 1.5]
    assert PowerOfTwoQuantizer(0.5).dequantize(codes).tolist() == [0, 0.5, 1, 2]
    assert codes.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype, last", [(torch.float32, 128), (torch.float64, 1024)])
def test_powers_of_two_are_exact_to_the_largest(dtype, last):
    quantizer = PowerOfTwoQuantizer()
    codes = torch.arange(1, last + 1)
    values = quantizer.dequantize(codes, dtype)
    assert values.tolist() == [2.0 ** (index - 1) for index in range(1, last + 1)]
    assert torch.equal(quantizer(values), values)
    assert torch.equal(quantizer.codes(values), codes)


def test_index_of_a_power_of_two():
    quantizer = PowerOfTwoQuantizer()
    for dtype in (torch.float32, torch.float64):
        powers = torch.tensor([0.0, 1.0, 2.0, 4.0, 2.0**31, 2.0**126], dtype=dtype)
        assert quantizer.codes(powers).tolist() == [0, 1, 2, 3, 32, 127]
    assert quantizer.codes(torch.tensor([2.0**1000], dtype=torch.float64)).tolist() == [1001]


def test_codes_of_an_empty_map():
    for quantizer in (UniformQuantizer(), PowerOfTwoQuantizer(1.0, 4, signed=True)):
        codes = quantizer.codes(torch.empty(0, 3))
        assert codes.shape == (0, 3) and codes.dtype == torch.int64
        assert quantizer.dequantize(codes).shape == (0, 3)


@pytest.mark.parametrize("quantizer_class", CODE_QUANTIZERS)
def test_what_has_no_code_is_refused(quantizer_class):
    with pytest.raises(ValueError, match=r"1 of 2 entries .*no code"):
        quantizer_class().codes(torch.tensor([1.0, NAN]))
    with pytest.raises(ValueError, match=r"1 of 2 entries .*no code"):
        quantizer_class().codes(torch.tensor([1.0, INF]))
    assert quantizer_class(1.0, 4).codes(torch.tensor([1.0, INF])).tolist() == [1, 3]


def test_an_index_beyond_int64_is_refused():
    with pytest.raises(ValueError, match="too large"):
        UniformQuantizer().codes(torch.tensor([1e30]))
    assert PowerOfTwoQuantizer().codes(torch.tensor([2.0**100])).tolist() == [101]


# ------------------------------------------------------------------------------------ properties, bad input


def test_properties():
    quantizer = UniformQuantizer(0.5, 4)
    assert (quantizer.max_code, quantizer.max_value, quantizer.has_gradient_mask) == (3, 1.5, True)
    quantizer = PowerOfTwoQuantizer(0.5, 4, signed=True)
    assert (quantizer.max_code, quantizer.max_value, quantizer.has_gradient_mask) == (3, 2.0, True)
    quantizer = UniformQuantizer(signed=True)
    assert (quantizer.max_code, quantizer.max_value, quantizer.has_gradient_mask) == (None, None, False)
    assert repr(UniformQuantizer(0.5, 4)) == "UniformQuantizer(stride=0.5, num_codes=4, signed=False)"
    assert not UniformQuantizer().state_dict() and not list(UniformQuantizer().parameters())


@pytest.mark.parametrize("quantizer_class", [*CODE_QUANTIZERS, ClampQuantizer])
@pytest.mark.parametrize("stride", [0.0, -1.0, NAN, INF, True, 1e-50, 1e39])
def test_bad_stride(quantizer_class, stride):
    with pytest.raises(ValueError) as error:
        quantizer_class(stride)
    for part in (quantizer_class.__name__, "MODEL.QMIMIC.QUANTIZER.STRIDE", repr(stride), "positive finite"):
        assert part in str(error.value)


@pytest.mark.parametrize("quantizer_class", [*CODE_QUANTIZERS, ClampQuantizer])
@pytest.mark.parametrize("num_codes", [1, -1, 2.5, NAN, INF, True])
def test_bad_number_of_codes(quantizer_class, num_codes):
    with pytest.raises(ValueError) as error:
        quantizer_class(1.0, num_codes)
    for part in (quantizer_class.__name__, "MODEL.QMIMIC.QUANTIZER.NUM_CODES", repr(num_codes), "2 or more", "0 for"):
        assert part in str(error.value)


def test_a_dictionary_beyond_float32_is_refused():
    assert PowerOfTwoQuantizer(1.0, 129)(torch.tensor([3e38])).tolist() == [2.0**127]
    for stride, num_codes in ((1.0, 130), (1.0, 256), (1e-30, 256), (1.0, 5000)):
        with pytest.raises(ValueError, match=rf"NUM_CODES is {num_codes}.*too large for float32; give fewer"):
            PowerOfTwoQuantizer(stride, num_codes)
    with pytest.raises(ValueError, match="NUM_CODES is 16.*STRIDE 1e\\+38"):
        UniformQuantizer(1e38, 16)


@pytest.mark.parametrize("quantizer_class", [*CODE_QUANTIZERS, ClampQuantizer])
def test_maps_that_are_no_floats_are_refused(quantizer_class):
    for x in (torch.tensor([1]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(ValueError, match=f"{quantizer_class.__name__} takes a floating-point map, not torch"):
            quantizer_class()(x)


@pytest.mark.parametrize(
    "quantizer, codes, message",
    [
        (UniformQuantizer(), torch.tensor([1.0]), "integer code indices, not torch.float32"),
        (UniformQuantizer(), torch.tensor([True]), "integer code indices, not torch.bool"),
        (UniformQuantizer(), torch.tensor([-1, 2]), "-1 to 2"),
        (UniformQuantizer(1.0, 4), torch.tensor([0, 4]), "0 to 4.*num_codes=4"),
        (PowerOfTwoQuantizer(1.0, 4, signed=True), torch.tensor([-4, 3]), "-4 to 3"),
    ],
)
def test_codes_outside_the_dictionary_are_refused(quantizer, codes, message):
    with pytest.raises(ValueError, match=message):
        quantizer.dequantize(codes)


def test_a_clamp_has_no_codes():
    clamp = ClampQuantizer()
    assert isinstance(clamp, Quantizer) and not isinstance(clamp, (CodeQuantizer, UniformQuantizer))
    assert not hasattr(clamp, "codes") and not hasattr(clamp, "dequantize")
    assert all(isinstance(each(), CodeQuantizer) for each in CODE_QUANTIZERS)


# ------------------------------------------------------------------------------------ config


def make_cfg(**options):
    cfg = get_cfg()
    add_qmimic_config(cfg)
    for key, value in options.items():
        cfg.MODEL.QMIMIC.QUANTIZER[key] = value
    return cfg


@pytest.mark.parametrize(
    "name, built", [("Uniform", UniformQuantizer), ("PowerOfTwo", PowerOfTwoQuantizer), ("Clamp", ClampQuantizer)]
)
def test_build_from_the_config(name, built):
    quantizer = build_quantizer(make_cfg(NAME=name, STRIDE=0.25, NUM_CODES=8, SIGNED=True))
    assert type(quantizer) is built
    assert (quantizer.stride, quantizer.num_codes, quantizer.signed) == (0.25, 8, True)


def test_build_defaults_are_the_papers():
    quantizer = build_quantizer(make_cfg())
    assert type(quantizer) is UniformQuantizer
    assert (quantizer.stride, quantizer.num_codes, quantizer.signed) == (1.0, 0, False)
    assert build_quantizer(make_cfg(NAME="")) is None


@pytest.mark.parametrize(
    "name, built", [("", UniformQuantizer), ("Clamp", UniformQuantizer), ("PowerOfTwo", PowerOfTwoQuantizer)]
)
def test_the_match_is_measured_on_codes_of_the_configs_stride(name, built):
    quantizer = build_code_quantizer(make_cfg(NAME=name, STRIDE=0.25))
    assert type(quantizer) is built and quantizer.stride == 0.25


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError) as error:
        build_quantizer(make_cfg(NAME="uniform"))
    names = ("'Clamp'", "'PowerOfTwo'", "'Uniform'")
    for part in ("MODEL.QMIMIC.QUANTIZER.NAME", "'uniform'", *names, '"" stands for none'):
        assert part in error.value.args[0]


def test_a_users_own_class_is_built_by_its_name():
    class FloorQuantizer(UniformQuantizer):
        def _nearest_(self, r):
            return r.floor_().clamp_(min=0.0, max=self.max_code)

    QUANTIZER_REGISTRY.register(FloorQuantizer)
    try:
        quantizer = build_quantizer(make_cfg(NAME="Floor", STRIDE=0.5))
        assert type(quantizer) is FloorQuantizer and isinstance(quantizer, Quantizer)
        x = torch.tensor([-1.0, 0.4, 0.9], requires_grad=True)
        y = quantizer(x)
        y.sum().backward()
        assert y.tolist() == [0, 0, 0.5] and x.grad.tolist() == [0, 1, 1]
        with pytest.raises(AssertionError):  # a taken name is not overwritten silently
            QUANTIZER_REGISTRY.register(FloorQuantizer)
    finally:
        QUANTIZER_REGISTRY._obj_map.pop("FloorQuantizer")
