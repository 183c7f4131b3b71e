"""Requests with several adapters and with none in the same passes, against models with the adapters merged in."""

import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from fp8_models import write_fp8, write_plain
from lora_adapters import ALL, ATTENTION, make_adapter, merge_adapter, write_adapter
from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.managers.io_struct import AbortReq, UnloadLoraReqInput
from safetensors.torch import load_file

PROMPTS = rm.random_prompts([5, 47, 17])
NUM_TOKENS = 6
NONE = 0
KINDS = {  # adapters as unlike each other as they can be, by their numbers
    1: {"rank": 6, "alpha": 12},
    2: {"targets": ("q_proj", "v_proj"), "rank": 3, "alpha": 2, "ranks": {"layers.1.self_attn.q_proj": 16}},
    3: {"targets": ("mlp.up_proj", "o_proj", "down_proj"), "rank": 8, "use_rslora": True,
        "alpha_pattern": {"down_proj": 3}, "layers_to_transform": None},
}  # fmt: skip


class Family:
    """A model, its adapters, and what transformers answers with each of them: greedy tokens and log-probabilities."""

    def __init__(self, folder, family, kinds):
        self.model = rm.make_model(folder / "model", family)
        self.adapters = {
            number: make_adapter(folder / str(number), self.model, seed=number, **kind)
            for number, kind in kinds.items()
        }
        merged = {NONE: self.model} | {
            number: merge_adapter(self.model, adapter, folder / f"merged{number}")
            for number, adapter in self.adapters.items()
        }
        self.tokens = {number: rm.hf_greedy(path, PROMPTS, NUM_TOKENS) for number, path in merged.items()}
        self.logprobs = {
            number: rm.hf_logprobs(path, [p + t for p, t in zip(PROMPTS, self.tokens[number], strict=True)])
            for number, path in merged.items()
        }

    def engine(self, **options):
        engine = EngineHarness(self.model, enable_lora=True, **options)
        for number, folder in self.adapters.items():
            assert engine.load_adapter(number, folder) == ""
        return engine

    def check(self, engine, numbers, repeats=1):
        """All prompts with all of the adapters at once."""
        engine.channel.outputs.clear()
        rids = [(number, place, n) for n in range(repeats) for number in numbers for place in range(len(PROMPTS))]
        for number, place, n in rids:
            engine.submit(
                f"{number} {place} {n}", PROMPTS[place], lora_id=number, max_new_tokens=NUM_TOKENS, return_logprob=True
            )
        results = engine.run()
        for number, place, n in rids:
            result = results[f"{number} {place} {n}"]
            assert result.token_ids == self.tokens[number][place], (number, place)
            logprobs = self.logprobs[number][place][len(PROMPTS[place]) - 1 : -1]
            expected = [float(row[token]) for row, token in zip(logprobs, result.token_ids, strict=True)]
            assert result.output_logprobs == pytest.approx(expected, abs=2e-4)
        return results


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("llama"), "llama3", KINDS)


def test_they_differ(llama):
    """Or else nothing below says anything."""
    answers = list(llama.tokens.values())
    assert all(a != b for i, a in enumerate(answers) for b in answers[:i])


def test_several_in_one_batch(llama):
    engine = llama.engine()
    llama.check(engine, [NONE, 1, 2, 3])
    assert engine.max_batch_size == 12


def test_prompts_in_chunks_and_hits_of_the_prefix_cache(llama):
    engine = llama.engine(chunked_prefill_size=16)
    llama.check(engine, [1, NONE, 3, 2])
    results = llama.check(engine, [2, 1, 3, NONE])
    assert {results[f"{number} 1 0"].cached_tokens for number in range(4)} == {44}


def test_no_adapter_gets_what_another_has_computed(llama):
    engine = llama.engine()
    for number in (NONE, 1, 2, 3):
        results = llama.check(engine, [number])
        assert [results[f"{number} {place} 0"].cached_tokens for place in range(len(PROMPTS))] == [0, 0, 0]


def test_requests_that_start_over(llama):
    """Too little KV cache for all: some give theirs away, and with it their adapter's slot."""
    engine = llama.engine(max_total_tokens=160, max_loras_per_batch=2)
    llama.check(engine, [1, 2, NONE, 3], repeats=2)
    assert engine.scheduler.running.num_retracted > 0


def test_more_adapters_than_slots(llama):
    engine = llama.engine(max_loras_per_batch=1)
    for _ in range(2):
        llama.check(engine, [1, 2, NONE, 3])
    slots = engine.scheduler.lora_slots
    assert slots.num_slots == 1 and not any(slots._num_users.values())


@pytest.mark.parametrize("family", sorted(rm.FAMILIES))
def test_every_family(tmp_path, family):
    """All that adapters can add to, whatever it is called and wherever it is: beside biases, norms and experts."""
    excluded = r".*(\.(experts|block_sparse_moe)\.|kv_b_proj|weights_proj).*"
    latent = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "wq_b", "wk")
    linear = ("out_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    kind = {
        "targets": (*ALL, "qkv_proj", "gate_up_proj", *latent, *linear),
        "target_modules": "all-linear",
        "exclude_modules": excluded,
    }
    found = Family(tmp_path, family, {1: kind})
    found.check(found.engine(), [NONE, 1])


def test_the_next_one_of_the_same_name(llama, tmp_path):
    """After another adapter has taken the place of one, nothing of it is left, neither in slots nor in the cache."""
    engine = llama.engine(max_loras_per_batch=1)
    llama.check(engine, [1])
    num_pages = engine.scheduler.caches[0].tree.num_evictable_pages
    assert engine.ask_for_adapter(UnloadLoraReqInput(request_id="x", lora_id=1)) == ""
    assert num_pages > 0 == engine.scheduler.caches[0].tree.num_evictable_pages
    assert engine.load_adapter(9, llama.adapters[2]) == ""
    engine.channel.outputs.clear()
    engine.submit("9", PROMPTS[1], lora_id=9, max_new_tokens=NUM_TOKENS)
    result = engine.run()["9"]
    assert (result.token_ids, result.cached_tokens) == (llama.tokens[2][1], 0)


def test_an_aborted_request_gives_its_slot_back(llama):
    engine = llama.engine(max_loras_per_batch=1)
    engine.submit("a", PROMPTS[0], lora_id=1, max_new_tokens=100)
    engine.step()
    engine.submit("b", PROMPTS[0], lora_id=2, max_new_tokens=100)
    engine.step()
    assert [running.req.rid for running in engine.scheduler.running.decoding] == ["a"]
    for rid in ("a", "b"):
        engine.send(AbortReq(rid=rid))
    engine.run()
    llama.check(engine, [3])


def test_pinned_adapters_keep_their_slots(llama):
    engine = EngineHarness(llama.model, enable_lora=True, max_loras_per_batch=2)
    assert engine.load_adapter(1, llama.adapters[1], pinned=True) == ""
    assert "1 adapters are pinned" in engine.load_adapter(2, llama.adapters[2], pinned=True)
    for number in (2, 3):
        assert engine.load_adapter(number, llama.adapters[number]) == ""
    for numbers in ([1], [2], [3], [2, 3], [1]):
        llama.check(engine, numbers)
        assert engine.scheduler.lora_slots._slots[1] == 0


def test_an_adapter_of_another_type(tmp_path):
    """Its bytes stay what they are; the products are made in the model's type."""
    family = Family(tmp_path, "llama2", {1: {"dtype": torch.bfloat16}})
    family.check(family.engine(), [NONE, 1])


def test_embeddings(tmp_path):
    """A decoder without its output head, whose adapter's tensors have no "model." in their names, as its own."""
    model = rm.make_embedding_model(tmp_path / "model")
    adapter = make_adapter(tmp_path / "a", model)
    assert not any("model.model.model." in name for name in load_file(adapter / "adapter_model.safetensors"))
    expected = rm.hf_hidden_states(merge_adapter(model, adapter, tmp_path / "merged"), PROMPTS)
    engine = EngineHarness(model, enable_lora=True)
    assert engine.load_adapter(1, adapter) == ""
    results = engine.generate(PROMPTS, lora_id=1, pooling=Pooling())
    for result, vector in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.tensor(result.vector), vector, atol=1e-4, rtol=1e-4)
    lost = make_adapter(tmp_path / "b", model, targets=("up_proj",), target_modules=["up_proj", "q_proj"])
    assert "names model.layers.0.self_attn.q_proj" in engine.load_adapter(2, lost)


def test_a_models_part_for_pictures(tmp_path):
    """What an adapter adds there is left out, as the part itself is: requests have no pictures."""
    model = rm.make_model(tmp_path / "model", "gemma3_vl")
    adapter = make_adapter(tmp_path / "a", model)
    assert any("vision_tower" in name for name in load_file(adapter / "adapter_model.safetensors"))
    expected = rm.hf_greedy(merge_adapter(model, adapter, tmp_path / "merged"), PROMPTS, NUM_TOKENS)
    engine = EngineHarness(model, enable_lora=True)
    assert engine.load_adapter(1, adapter) == ""
    results = engine.generate(PROMPTS, lora_id=1, max_new_tokens=NUM_TOKENS)
    assert [result.token_ids for result in results] == expected
    idle = make_adapter(tmp_path / "b", model, targets=("fc1",))
    assert "no part of the model for text" in engine.load_adapter(2, idle)


def test_fused_matrices(llama, tmp_path):
    """One A for q, k and v, and one for gate and up, as adapters of models have them that have one matrix each."""
    plain = load_file(llama.adapters[1] / "adapter_model.safetensors")
    fused, split = {}, {}
    for layer in range(3):
        for block, whole, parts in (("self_attn", "qkv_proj", "qkv"), ("mlp", "gate_up_proj", ("gate", "up"))):
            prefix = f"base_model.model.model.layers.{layer}.{block}"
            names = [f"{prefix}.{part}_proj" for part in parts]
            b = {f"{name}.lora_B.weight": plain[f"{name}.lora_B.weight"] for name in names}
            a = plain[f"{names[0]}.lora_A.weight"]
            fused |= {f"{prefix}.{whole}.lora_A.weight": a, f"{prefix}.{whole}.lora_B.weight": torch.cat([*b.values()])}
            split |= b | {f"{name}.lora_A.weight": a.clone() for name in names}
    config = {"r": 6, "lora_alpha": 12}
    folder = write_adapter(tmp_path / "fused", fused, target_modules=["qkv_proj", "gate_up_proj"], **config)
    same = write_adapter(tmp_path / "split", split, target_modules="all-linear", **config)
    engine = EngineHarness(llama.model, enable_lora=True)
    assert engine.load_adapter(1, folder) == ""
    results = engine.generate(PROMPTS, lora_id=1, max_new_tokens=NUM_TOKENS)
    merged = merge_adapter(llama.model, same, tmp_path / "merged")
    assert [result.token_ids for result in results] == rm.hf_greedy(merged, PROMPTS, NUM_TOKENS)


@pytest.mark.parametrize("kind", ["rows", "blocks"])
def test_beside_a_quantised_model(tmp_path, kind):
    """The products with the adapter are those of the whole sums; the model's own matrices stay in fp8."""
    model = write_fp8(rm.make_model(tmp_path / "model", "qwen3"), tmp_path / "fp8", kind)
    plain = write_plain(model, tmp_path / "plain")
    adapter = make_adapter(tmp_path / "a", plain)
    expected = rm.hf_greedy(merge_adapter(plain, adapter, tmp_path / "merged"), PROMPTS, NUM_TOKENS)
    engine = EngineHarness(model, enable_lora=True)
    assert engine.load_adapter(1, adapter) == ""
    results = engine.generate(PROMPTS, lora_id=1, max_new_tokens=NUM_TOKENS)
    assert [result.token_ids for result in results] == expected


def test_what_peft_writes_and_answers(llama, tmp_path):
    """Where peft is installed: its files, its choice of matrices, ranks and scales, and its sums."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules="all-linear", use_rslora=True, init_lora_weights=False,
        rank_pattern={"q_proj": 7, r"layers\.1\..*up_proj": 2}, alpha_pattern={"mlp.down_proj": 3},
        exclude_modules=["layers.2.self_attn.k_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(3)
    model = peft.get_peft_model(rm.load_hf(llama.model), config)
    model.save_pretrained(tmp_path)
    engine = EngineHarness(llama.model, enable_lora=True)
    assert engine.load_adapter(1, tmp_path) == ""
    for result, prompt in zip(engine.generate(PROMPTS, lora_id=1, max_new_tokens=4, return_logprob=True), PROMPTS,
                              strict=True):  # fmt: skip
        ids = prompt + result.token_ids
        with torch.inference_mode():
            logprobs = (
                model.eval()(torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            )
        assert logprobs.argmax(-1).tolist() == result.token_ids
        assert result.output_logprobs == pytest.approx(logprobs.max(-1).values.tolist(), abs=2e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_lora_rank": 4}, "the adapter has the rank 6; --max-lora-rank is 4"),
        ({"model": "qwen3_moe"}, "adds to model.layers.0.mlp.down_proj"),
        ({"model": "llama2"}, "has the shape"),
    ],
)
def test_adapters_that_do_not_fit(llama, tmp_path, options, words):
    family = options.pop("model", None)
    model = llama.model if family is None else rm.make_model(tmp_path, family)
    engine = EngineHarness(model, enable_lora=True, **options)
    assert words in engine.load_adapter(1, llama.adapters[1])
    assert engine.load_adapter(2, make_adapter(tmp_path / "a", model, rank=4, targets=ATTENTION)) == ""


def test_an_adapter_that_lost_a_part(llama, tmp_path):
    folder = make_adapter(tmp_path, llama.model, targets=("mlp.up_proj",), target_modules=["up_proj", "q_proj"])
    engine = EngineHarness(llama.model, enable_lora=True)
    assert "names model.layers.0.self_attn.q_proj" in engine.load_adapter(1, folder)
