"""Prints what a KV cache in fp8 does to log-probabilities, beside what bfloat16 does to those of float32.

    python test/manual/cache_quality.py [--model-path FOLDER | --family NAME] [--num-texts 40]

Of the prompt tokens of some texts: mean and 99th percentile of the absolute differences, and the mean log-probability
of each. The model is the demo model, which sees the dialogues that it was trained on; any other sees random token ids.
With `--family` it is a random one of the tests' (llama3, gpt_oss, …). Prompts come in chunks, so that later ones read
the cache. On a GPU `--device cuda`. No limits are checked.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("python", "test", "examples", "benchmark")]

from bench_common import percentile  # noqa: E402 - made importable above
from demo_corpus import make_dialogues  # noqa: E402
from make_demo_model import render  # noqa: E402
from ramet import Engine  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

DEMO = ROOT / "examples" / "demo_model"
RANDOM_LEN = 40
CHUNK = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=DEMO)
    parser.add_argument("--family", help="a random model of one of the tests' families")
    parser.add_argument("--num-texts", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = args.model_path
        if args.family:
            import random_models as rm

            folder = rm.make_model(Path(work) / "model", args.family)
        prompts = make_prompts(folder, args.num_texts)
        kinds = {"float32": ("float32", "auto"), "bfloat16": ("bfloat16", "auto"), "fp8": ("bfloat16", "fp8_e4m3")}
        found = {name: measure(folder, prompts, args.device, *kind) for name, kind in kinds.items()}
    for base, other in (("float32", "bfloat16"), ("bfloat16", "fp8")):
        differences = [abs(one - two) for one, two in zip(found[base], found[other], strict=True)]
        print(f"{other} from {base}: mean {mean(differences):.3f}, p99 {percentile(differences, 0.99):.2f}; "
              f"mean log-probability {mean(found[base]):.3f} -> {mean(found[other]):.3f}, "
              f"{len(differences)} tokens")  # fmt: skip


def make_prompts(folder: Path, count: int) -> list[list[int]]:
    generator = random.Random(0)
    if folder != DEMO:
        return [[generator.randrange(10, 300) for _ in range(RANDOM_LEN)] for _ in range(count)]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    dialogues = generator.sample(make_dialogues(), count)
    return [tokenizer.encode(render(*one), add_special_tokens=False).ids for one in dialogues]


def measure(folder: Path, prompts: list[list[int]], device: str, dtype: str, kv_cache_dtype: str) -> list[float]:
    """The log-probabilities of all tokens of the prompts but the first ones."""
    options = {"max_total_tokens": 8192, "chunked_prefill_size": CHUNK, "device": device}
    with Engine(model_path=str(folder), dtype=dtype, kv_cache_dtype=kv_cache_dtype, **options) as engine:
        sampling = {"max_new_tokens": 1, "temperature": 0}
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True, logprob_start_len=0)
    return [entry[0] for output in outputs for entry in output["meta_info"]["input_token_logprobs"][1:]]


if __name__ == "__main__":
    main()
