"""A KV cache in fp8: what it answers, the scales that checkpoints have for it, and where those go."""

import fp8_models as fp8
import published_weights as pw
import pytest
import random_models as rm
import sharded_models as sm
import torch
from engine_harness import EngineHarness
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.managers.io_struct import AbortReq
from ramet.srt.mem_cache.memory_pool import MAX_FP8, KVSpec, TokenToKVPool
from ramet.srt.model_loader.checkpoint.digest_store import compute_table
from ramet.srt.model_loader.client.band_check import check_bands
from ramet.srt.weights.memory_messages import ReleaseMemoryReq
from ramet.srt.weights.planner import ArenaSource, plan, zero_ranges
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from updated_engine import Updated

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
SCALES = {0: (0.011, 0.4), 1: (0.3, 0.0021), 2: (0.02, 0.03)}  # of keys and values of each layer; some clip
SPELLINGS = {
    "compressed-tensors": ("self_attn.{0}_scale", {"kv_cache_scheme": SCHEME}),
    "of a module": ("self_attn.attn.{0}_scale", {"kv_cache_scheme": SCHEME}),
    "AutoFP8": ("self_attn.{0}_proj.output_scale", {"kv_cache_scheme": "static"}),
    "modelopt": ("self_attn.{0}_proj.{0}_scale", {"kv_cache_quant_algo": "FP8"}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("models") / "plain", "llama3")


def write(source, target, spelling="compressed-tensors", *, scales=SCALES, shape=(1,), more=None, dtype=torch.float32):
    """The model as an fp8 checkpoint, with scales for its cache."""
    name, section = SPELLINGS[spelling]
    kind = {"AutoFP8": "tensor", "modelopt": "modelopt"}.get(spelling, "rows")
    fp8.write_fp8(source, target, kind, **section)
    tensors = load_file(target / "model.safetensors") | (more or {})
    for layer, pair in scales.items():
        for part, value in zip("kv", pair, strict=True):
            tensor = torch.full(shape, value, dtype=dtype)
            tensors[f"model.layers.{layer}.{name.format(part)}"] = tensor
    save_file(tensors, target / "model.safetensors")
    return target


def engine(folder, **options):
    return EngineHarness(folder, device="cpu", dtype="float32", kv_cache_dtype="fp8_e4m3", **options)


def held_scales(model):
    return [layer.self_attn.attn.kv_scales.tolist() for layer in model.model.layers.values()]


class RoundedCache(DynamicCache):
    """Keys and values as an fp8 cache gives them back."""

    def __init__(self, scales):
        super().__init__()
        self.scales = scales

    def update(self, keys, values, layer_idx, *args, **kwargs):
        scales = self.scales.get(layer_idx, (1.0, 1.0))
        rounded = (
            (part / scale).clamp(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn).float() * scale
            for part, scale in zip((keys, values), scales, strict=True)
        )
        return super().update(*rounded, layer_idx, *args, **kwargs)


def expected_logprobs(folder, sequence, scales):
    model = rm.load_hf(folder)
    with torch.no_grad():
        logits = model(torch.tensor([sequence]), past_key_values=RoundedCache(scales)).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("has_scales", [False, True])
def test_answers_are_those_of_rounded_keys_and_values(plain, tmp_path, has_scales):
    """Of prompts in chunks, and behind what is cached; transformers rounds in its own cache."""
    folder = write(plain, tmp_path / "fp8") if has_scales else plain
    reference = fp8.write_plain(folder, tmp_path / "reference") if has_scales else plain
    harness = engine(folder, chunked_prefill_size=16)
    prompt = rm.random_prompts([45])[0]
    for _ in range(2):
        result = harness.generate([prompt], max_new_tokens=4, logprob_start_len=0)[0]
        sequence = prompt + result.token_ids
        logprobs = expected_logprobs(reference, sequence, SCALES if has_scales else {})
        places = torch.arange(len(prompt) - 1)
        expected = logprobs[places, torch.tensor(prompt[1:])]
        torch.testing.assert_close(torch.tensor(result.input_logprobs.logprobs[1:]), expected, atol=2e-3, rtol=0)
        outputs = logprobs[torch.arange(len(prompt) - 1, len(sequence) - 1), torch.tensor(result.token_ids)]
        torch.testing.assert_close(torch.tensor(result.output_logprobs), outputs, atol=2e-3, rtol=0)
    hit = harness.generate([prompt], max_new_tokens=4)[0]
    assert hit.cached_tokens >= 44 - harness.args.page_size and hit.token_ids == result.token_ids


def test_half_the_bytes_are_twice_the_tokens(plain):
    pools = [EngineHarness(plain, device="cpu", dtype="bfloat16", kv_cache_dtype=kind).runner.kv_pool
             for kind in ("auto", "fp8_e4m3")]  # fmt: skip
    assert pools[0].buffer.nbytes == 2 * pools[1].buffer.nbytes and pools[1].is_fp8


def test_what_is_beyond_the_largest_number_becomes_that():
    kv = KVSpec(1, 2, 2)
    pool = TokenToKVPool(num_pages=1, page_size=4, layers=[kv], dtype=fp8.FP8, device=torch.device("cpu"))
    numbers = torch.tensor([[[1e6, -1e30]]])
    pool.set_kv_buffer(0, torch.tensor([5]), numbers, numbers, torch.tensor([1.0, 1e4]))
    keys, values = pool.get_kv_buffer(0)
    assert keys[5].float().tolist() == [[448.0, -448.0]] and values[5].float().tolist() == [[96.0, -448.0]]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_whatever_the_caches_type(plain, tmp_path, spelling, shape):
    folder = write(plain, tmp_path / "fp8", spelling, shape=shape)
    for parallel in (*sm.all_ranks(2), *sm.ranks_of(pp_size=2)):
        held = held_scales(fp8.load_model(folder, parallel))
        layers = parallel.layer_range(len(SCALES))
        torch.testing.assert_close(held, [list(SCALES[layer]) for layer in layers])


def test_one_scale_for_both_and_none_for_some(plain, tmp_path):
    more = {"model.layers.1.self_attn.kv_scale": torch.tensor(0.5)}
    folder = write(plain, tmp_path / "fp8", scales={}, more=more)
    assert held_scales(fp8.load_model(folder)) == [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": {0: (0.0, 1.0)}}, "layers.0.self_attn.k_scale is 0.0; a scale of the KV cache must be above 0"),
        ({"scales": {1: (1.0, float("nan"))}}, "layers.1.self_attn.v_scale is nan"),
        ({"shape": (2,)}, r"self_attn.k_scale has the shape \(2,\), the model needs \(1,\)"),
        ({"more": {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0)}}, "self_attn.k_scale twice"),
    ],
)
def test_scales_that_are_none_are_refused(plain, tmp_path, options, message):
    folder = write(plain, tmp_path / "fp8", **options)
    with pytest.raises(ValueError, match=message):
        engine(folder)


def test_scales_of_which_the_config_says_nothing_are_not_passed_over(plain, tmp_path):
    folder = write(plain, tmp_path / "fp8")
    fp8.change_config(folder, quantization_config=ModelConfig.from_path(str(plain)).quantization_config)
    plain_tensors = load_file(plain / "model.safetensors")
    scales = {name: one for name, one in load_file(folder / "model.safetensors").items() if name.endswith("k_scale")}
    save_file(plain_tensors | scales, folder / "model.safetensors")
    with pytest.raises(ValueError, match="k_scale, a scale for a KV cache in fp8, but config.json has no kv_cache_sch"):
        engine(folder)
    EngineHarness(folder, device="cpu", dtype="float32")


def test_scales_of_heads_are_refused_where_they_would_be_used(plain, tmp_path):
    folder = fp8.write_fp8(plain, tmp_path / "fp8", "rows", kv_cache_scheme=SCHEME | {"strategy": "attn_head"})
    with pytest.raises(ValueError, match="this model has scales by 'attn_head'"):
        engine(folder)
    assert not ModelConfig.from_path(str(folder)).has_cache_scales


@pytest.mark.parametrize(("seed", "client"), [((2, 1), (1, 1)), ((1, 1), (2, 1))])
def test_scales_move_with_the_weights(plain, tmp_path, seed, client):
    folder = write(plain, tmp_path / "fp8", scales={0: SCALES[0]})
    manifests = [sm.make_manifest(sm.build_model(folder, parallel)) for parallel in sm.all_ranks(*seed)]
    seeds = [sm.load_from_disk(folder, manifest) for manifest in manifests]
    sources = [ArenaSource(f"rank {rank}", manifest) for rank, manifest in enumerate(manifests)]
    table = compute_table(str(folder))
    for parallel in sm.all_ranks(*client):
        manifest = sm.make_manifest(sm.build_model(folder, parallel))
        expected = sm.load_from_disk(folder, manifest)
        memory = bytearray(b"\xee" * manifest.arena_nbytes)
        for start, stop in zero_ranges(manifest):
            memory[start:stop] = bytes(stop - start)
        sm.execute(plan(manifest, sources).ops, [one.memory for one in seeds], memoryview(memory))
        assert memory == expected.memory[: manifest.arena_nbytes]
        check = check_bands(expected, table)
        assert not check.wrong and not check.unchecked
        for place, layer in enumerate(("0", "1")):  # a scale that the files have, and one that they don't
            entry = next(one for one in manifest.entries if one.name.endswith(f"{layer}.self_attn.attn.kv_scales"))
            expected.tensor(entry)[place] *= 2
            assert entry.name in check_bands(expected, table).wrong


def test_an_update_may_bring_scales_or_leave_them(plain, tmp_path):
    updated = Updated(write(plain, tmp_path / "fp8"))
    bucket = tmp_path / "bucket.safetensors"
    save_file({"model.layers.1.self_attn.attn.v_scale": torch.tensor(0.25)}, bucket)
    assert updated.put(bucket).success and updated.seal().success and updated.switch().success
    held = held_scales(updated.engine.runner.model)
    torch.testing.assert_close(held, [list(SCALES[0]), [SCALES[1][0], 0.25], list(SCALES[2])])


@pytest.mark.parametrize("paused", ["", "in_place", "retract"])
def test_keys_and_values_by_old_scales_are_not_read_with_new_ones(plain, tmp_path, paused):
    """A request that runs through a change of scales, also in a pause, is computed anew from its tokens."""
    folder = write(plain, tmp_path / "fp8")
    updated = Updated(folder, device="cpu", dtype="float32", kv_cache_dtype="fp8_e4m3")
    engine, scheduler = updated.engine, updated.engine.scheduler
    bucket, changed = tmp_path / "bucket.safetensors", {0: (0.3, 0.02), 2: (1.0, 1.0)}
    save_file({f"model.layers.{layer}.self_attn.{part}_scale": torch.tensor(value)
               for layer, pair in changed.items() for part, value in zip("kv", pair, strict=True)}, bucket)  # fmt: skip
    assert updated.put(bucket).success and updated.seal().success
    prompt, ended = rm.random_prompts([30, 9])
    engine.submit("a", prompt, max_new_tokens=8, return_logprob=True)
    engine.submit("b", ended, max_new_tokens=8)
    for _ in range(4):
        engine.step()
    if paused:
        scheduler.pause(paused)
    else:
        engine.send(AbortReq(rid="b"))
    assert updated.switch().success
    scheduler.go_on()
    results = engine.run()
    result, (before, after) = results["a"], results["a"].versions
    assert after[0] == "new" and 0 < after[1] < 8 and len(result.token_ids) == 8
    assert results["b"].finish_reason.type == ("length" if paused else "abort")
    sequence, reference = prompt + result.token_ids, fp8.write_plain(folder, tmp_path / "reference")
    for (_, start), stop, scales in ((before, after[1], SCALES), (after, 8, SCALES | changed)):
        logprobs = expected_logprobs(reference, sequence, scales)
        places = torch.arange(len(prompt) - 1 + start, len(prompt) - 1 + stop)
        expected = logprobs[places, torch.tensor(result.token_ids[start:stop])]
        torch.testing.assert_close(torch.tensor(result.output_logprobs[start:stop]), expected, atol=2e-3, rtol=0)


def test_another_name_for_the_same_scales_leaves_requests_what_they_have(plain, tmp_path):
    harness = engine(write(plain, tmp_path / "fp8"))
    harness.submit("a", rm.random_prompts([9])[0], max_new_tokens=8)
    for _ in range(3):
        harness.step()
    harness.scheduler.rename_weights("renamed", abort_all=False)
    assert len(harness.scheduler.running.admitted()) == 1
    harness.run()


def published_scales(folder, weights):
    """What an instance has of a trainer's cache scales."""
    with pw.published(weights) as publishers:
        stage, _ = pw.take(folder, publishers, sm.ranks_of()[0])
    entries = [entry for entry in stage.manifest.entries if entry.name.endswith("kv_scales")]
    return [stage.tensor(entry).tolist() for entry in entries]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_trainer_may_publish_scales_or_leave_them_out(plain, tmp_path, shape):
    """Those that it has not are 1, as in files."""
    folder = write(plain, tmp_path / "fp8", shape=shape)
    weights = load_file(folder / "model.safetensors")
    torch.testing.assert_close(published_scales(folder, weights), [list(SCALES[layer]) for layer in sorted(SCALES)])
    for name in [
        name for name in weights if name.endswith(("0.self_attn.k_scale", "2.self_attn.k_scale", "2.self_attn.v_scale"))
    ]:
        del weights[name]
    torch.testing.assert_close(published_scales(folder, weights), [[1.0, SCALES[0][1]], list(SCALES[1]), [1.0, 1.0]])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none_are_refused_whoever_brings_them(plain, tmp_path, value):
    name, folder = "model.layers.1.self_attn.v_scale", write(plain, tmp_path / "fp8")
    tensors = {name: torch.tensor(value)}
    with pytest.raises(ValueError, match=f"the trainer: {name} is {value}; a scale of the KV cache must be above 0"):
        published_scales(folder, load_file(folder / "model.safetensors") | tensors)
    updated, bucket = Updated(folder), tmp_path / "bucket.safetensors"
    save_file(tensors, bucket)
    assert updated.put(bucket).success
    sealed = updated.seal()
    assert not sealed.success and f"what was sent: {name} is {value}; a scale" in sealed.message


def test_scales_that_have_gone_in_a_sleep_are_not_guessed(plain, tmp_path):
    """Other weights that come alone would be served with scales that nobody has given."""
    folder, bucket = write(plain, tmp_path / "fp8"), tmp_path / "bucket.safetensors"
    updated = Updated(folder, enable_memory_saver=True)
    updated.engine.scheduler.pause("retract")
    assert updated.ask(ReleaseMemoryReq(request_id="sleep", tags=["weights"], keeps_copy=False)).success
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if not name.endswith("1.self_attn.v_scale")}, bucket)
    assert updated.put(bucket).success
    sealed = updated.seal()
    assert not sealed.success and "layers.1.self_attn.v_scale did not come" in sealed.message
    assert updated.put(folder / "model.safetensors", 2).success and updated.seal(2).success
    assert updated.switch(2).success
    torch.testing.assert_close(
        held_scales(updated.engine.runner.model), [list(SCALES[layer]) for layer in sorted(SCALES)]
    )
