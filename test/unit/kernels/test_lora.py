"""The kernels that add adapters to a layer's output, against the products one by one; and the way that CPUs take."""

import numpy as np
import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from lora_adapters import make_adapter, merge_adapter
from ramet.srt.layers.lora import BLOCK_OUTPUTS, LoraPart, LoraSlots, LoraTokens, parts_of, slots_nbytes, sort_by_slot
from ramet.srt.weights.manifest import WeightBox

NUM_SLOTS, MAX_RANK, NUM_COLUMNS = 3, 70, 300
# A fused layer: its second part is a rank's share of a matrix, and its first stands in two pieces around it.
PARTS = [
    LoraPart("first", (0, NUM_COLUMNS), ((0, 70), (70, 80)), ((0, 70), (85, 95))),
    LoraPart("second", (0, NUM_COLUMNS), ((30, 45),), ((70, 85),)),
]
ADAPTERS = {0: {"first": (7, 2.0), "second": (70, 0.5)}, 2: {"second": (1, 3.0)}}  # rank and scale; slot 1 is empty
CASES = {
    "one token": [0],
    "one adapter": [2] * 5,
    "mixed with tokens of none": [0, 0, -1, 2, 1, 0, -1, 2],
    "several blocks": [0, 2, -1] * 15,
    "nobody's": [-1] * 4,
}


def make_layer(device, tokens, dtype=torch.float32):
    slots = LoraSlots(PARTS, NUM_SLOTS, MAX_RANK, dtype, device, tokens)
    generator = torch.Generator().manual_seed(0)
    products = {}
    for slot, adapter in ADAPTERS.items():
        for place, part in enumerate(PARTS):
            if part.name in adapter:
                rank, scale = adapter[part.name]
                a = torch.randn(rank, NUM_COLUMNS, generator=generator)
                b = torch.randn(part.num_rows, rank, generator=generator)
                slots.put(slot, place, a, b, scale)
                products[slot, place] = scale * b @ a
    return slots, products


def expect(x, y, token_slots, products):
    y = y.clone()
    for token, slot in enumerate(token_slots):
        for place, part in enumerate(PARTS):
            if (slot, place) in products:
                more = products[slot, place] @ x[token]
                start = 0
                for first, stop in part.outputs:
                    y[token, first:stop] += more[start : start + stop - first]
                    start += stop - first
    return y


def random_pass(num_tokens):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, NUM_COLUMNS, generator=generator), torch.randn(num_tokens, 95, generator=generator)


@pytest.mark.parametrize("token_slots", CASES.values(), ids=CASES)
def test_kernels(device, token_slots, monkeypatch, max_splits=32):
    from ramet.srt.layers.kernels import lora

    monkeypatch.setattr(lora, "MAX_SPLITS", max_splits)
    slots, products = make_layer(device, LoraTokens(0, NUM_SLOTS, device))
    x, y = random_pass(len(token_slots))
    expected = expect(x, y, token_slots, products)
    by_slot = torch.from_numpy(sort_by_slot(np.array(token_slots), NUM_SLOTS)).to(device)
    x, y = x.to(device), y.to(device)
    lora.add_adapters(x, y, by_slot, slots.a, slots.b, slots.scales, slots.blocks, BLOCK_OUTPUTS)
    torch.testing.assert_close(y.cpu(), expected, atol=1e-4, rtol=1e-5)


def test_kernels_of_long_passes(device, monkeypatch):
    from ramet.srt.layers.kernels import lora

    monkeypatch.setattr(lora, "FEW_TOKENS", 8)
    test_kernels(device, CASES["several blocks"], monkeypatch)


def test_kernels_whose_programs_take_several_blocks_of_columns(device, monkeypatch):
    test_kernels(device, CASES["mixed with tokens of none"], monkeypatch, max_splits=3)


def test_an_engine_whose_layers_take_the_kernels(device, tmp_path, monkeypatch):
    """Fused layers with their parts, prompts in chunks beside tokens, and two adapters for one slot."""
    from ramet.srt.layers import lora

    monkeypatch.setattr(lora, "use_kernels", lambda x: True)
    model = rm.make_model(tmp_path / "model", "llama3", num_hidden_layers=1)
    prompts = rm.random_prompts([5, 21])
    engine = EngineHarness(model, enable_lora=True, max_loras_per_batch=1, chunked_prefill_size=8, device=device.type)
    expected = {}
    for number in (1, 2):
        folder = make_adapter(tmp_path / str(number), model, seed=number, rank=2 + number)
        assert engine.load_adapter(number, folder) == ""
        merged = merge_adapter(model, folder, tmp_path / f"merged{number}")
        expected |= {f"{number} {i}": tokens for i, tokens in enumerate(rm.hf_greedy(merged, prompts, 3))}
        for i, prompt in enumerate(prompts):
            engine.submit(f"{number} {i}", prompt, lora_id=number, max_new_tokens=3)
    assert {rid: result.token_ids for rid, result in engine.run().items()} == expected


@pytest.mark.parametrize("token_slots", CASES.values(), ids=CASES)
def test_on_cpus(token_slots):
    tokens = LoraTokens(0, NUM_SLOTS, torch.device("cpu"))
    slots, products = make_layer(torch.device("cpu"), tokens)
    x, y = random_pass(len(token_slots))
    expected = expect(x, y, token_slots, products)
    tokens.begin(np.array(token_slots, dtype=np.int32))
    torch.testing.assert_close(slots.add(x, y), expected, atol=1e-4, rtol=1e-5)
    tokens.begin(None)
    torch.testing.assert_close(slots.add(x, expected.clone()), expected, atol=0, rtol=0)


def test_a_slot_is_taken_by_another_adapter():
    """Nothing of the one before is left: of its larger rank, and of a part that the new one has nothing for."""
    tokens = LoraTokens(0, NUM_SLOTS, torch.device("cpu"))
    slots, _ = make_layer(torch.device("cpu"), tokens)
    x, y = random_pass(2)
    tokens.begin(np.array([0, 0], dtype=np.int32))
    slots.clear(0)
    torch.testing.assert_close(slots.add(x, y.clone()), y, atol=0, rtol=0)
    a, b = torch.randn(2, NUM_COLUMNS), torch.randn(15, 2)
    slots.put(0, 1, a, b, 1.0)
    assert not slots.a[0, 1, 2:].any() and not slots.b[0, 70:85, 2:].any() and slots.scales[0].tolist() == [0.0, 1.0]
    expected = expect(x, y, [0, 0], {(0, 1): b @ a})
    torch.testing.assert_close(slots.add(x, y), expected, atol=1e-4, rtol=1e-5)


def test_captured_passes_read_what_is_staged():
    tokens = LoraTokens(4, NUM_SLOTS, torch.device("cpu"))
    tokens.begin_capture()
    address = tokens.by_slot.data_ptr()
    tokens.begin(np.array([2, 0, 1, 2, 0, 0, 1], dtype=np.int32))  # a longer pass, which is not captured
    tokens.stage(np.array([2, -1, 1, 2, 0, 0], dtype=np.int32))  # padded with tokens that are none
    tokens.begin_capture()
    starts, order = tokens.by_slot[: NUM_SLOTS + 1].tolist(), tokens.by_slot[NUM_SLOTS + 1 :].tolist()
    assert starts == [1, 1, 2, 4] and order == [1, 2, 0, 3]
    tokens.stage(None)
    assert not tokens.by_slot[: NUM_SLOTS + 1].any() and tokens.by_slot.data_ptr() == address


def test_parts_of_a_fused_layer():
    """Boxes of one checkpoint matrix with the same columns are one part, with one A."""
    boxes = [
        WeightBox("x.qkv.weight", ((0, 8), (0, 4)), ((0, 8), (0, 4))),
        WeightBox("x.qkv.weight", ((16, 20), (0, 4)), ((8, 12), (0, 4))),
        WeightBox("x.gate.weight", ((2, 4), (0, 4)), ((12, 14), (0, 4))),
    ]
    first, second = parts_of(boxes)
    assert (first.name, first.rows, first.outputs) == ("x.qkv", ((0, 8), (16, 20)), ((0, 8), (8, 12)))
    assert (second.name, second.num_rows) == ("x.gate", 2)
    slots = LoraSlots([first, second], 2, 3, torch.float32, torch.device("cpu"), LoraTokens(0, 2, torch.device("cpu")))
    assert slots_nbytes([first, second], 2, 3, 4) == slots.a.nbytes + slots.b.nbytes
