"""Learns by reinforcement: a trainer publishes each step's weights, and two instances of different layouts take them.

    python examples/rl_loop.py [--steps 30] [--picture rl_loop.svg] [--threads 2] [--log-dir FOLDER]

The policy is the demo model. A rule rewards its answers: the share of words that begin with a "p". Each step the
instances (one of one rank, one of two tensor-parallel ranks) answer the same questions, the trainer takes a step of the
policy gradient on the answers, and publishes; the instances take the new version from it, or from each other, and
every answer says which version it is of. Takes some minutes on two cores, needs the `test` extra (transformers), and
ends with exit code 0 if the reward has risen, with the curve as a picture.
"""

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from clone_demo import DEMO_MODEL, DemoError, Instance, stop_all
from demo_corpus import make_dialogues
from ramet.srt.utils.net import listen_on
from ramet.trainer import WeightPublisher
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

MODEL_NAME = "demo-policy"
NUM_QUESTIONS, NUM_SAMPLES = 8, 8  # of each step: questions, and answers to each of them
ANSWER_LEN = 16  # tokens
LEARNING_RATE = 4e-4
WANTED_RISE = 0.2  # of the mean reward, from the first steps to the last ones
SMOOTHED = 5  # steps
LAYOUTS = {"one rank": [], "two ranks": ["--tp-size", "2"]}


def reward(answer: str) -> float:
    """The rule: the share of an answer's words that begin with a "p"."""
    words = answer.split()
    return sum(word.lower().startswith("p") for word in words) / max(1, len(words))


def free_port() -> int:
    with listen_on("127.0.0.1", 0) as listener:
        return listener.getsockname()[1]


class Rollouts:
    """The metadata server and the instances."""

    def __init__(self, logs: Path, timeout_s: float) -> None:
        self.metadata = f"127.0.0.1:{free_port()}"
        self.running = [
            Instance(
                "metadata server",
                free_port(),
                logs / "metadata.log",
                ["--port", self.metadata.rpartition(":")[2]],
                module="ramet.modelexpress_server",
            )
        ]
        settings = json.dumps({"url": self.metadata, "model_name": MODEL_NAME, "source": True})
        flags = [
            "--model-path",
            str(DEMO_MODEL),
            "--modelexpress-config",
            settings,
            "--engine-info-bootstrap-port",
            "0",
        ]
        flags += ["--max-total-tokens", "8192", "--max-running-requests", "64"]
        for name, layout in LAYOUTS.items():
            log = logs / f"{name.replace(' ', '-')}.log"
            self.running.append(Instance(f"instance of {name}", free_port(), log, [*flags, *layout]))
        self._timeout_s = timeout_s

    @property
    def instances(self) -> list[Instance]:
        return self.running[1:]

    def wait_ready(self) -> None:
        for instance in self.running:
            instance.wait_ready(self._timeout_s)

    def take(self, version: str) -> None:
        """Have all instances serve a version."""
        body = {"version": version}
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda one: one.call("/update_weights_from_instance", body), self.instances))

    def sample(self, prompts: list[list[int]], version: str) -> list[dict]:
        """An answer to each prompt, the prompts shared out over the instances; all of them by that version."""
        share = -(-len(prompts) // len(self.instances))
        parts = [prompts[start : start + share] for start in range(0, len(prompts), share)]
        params = {"temperature": 1.0, "max_new_tokens": ANSWER_LEN, "ignore_eos": True}

        def ask(instance: Instance, part: list[list[int]]) -> list[dict]:
            return instance.call("/generate", {"input_ids": part, "sampling_params": params})

        with ThreadPoolExecutor() as pool:
            answers = [one for part in pool.map(ask, self.instances, parts) for one in part]
        others = {answer["meta_info"]["weight_version"] for answer in answers} - {version}
        if others:
            raise DemoError(f"there are answers by {', '.join(others)}, not by {version}")
        return answers


def take_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, prompts: list[list[int]], answers: list[list[int]],
    advantages: torch.Tensor,
) -> None:  # fmt: skip
    """One step of the policy gradient.

    Args:
        advantages: of each answer, float32 [number of answers].
    """
    longest = max(len(prompt) for prompt in prompts) + ANSWER_LEN
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    is_answer = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor([*prompt, *answer])
        is_answer[row, len(prompt) : stop] = True
    logits = model(input_ids=ids).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    loss = -(chosen * is_answer[:, 1:] * advantages[:, None]).sum() / is_answer.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def advantages_of(rewards: torch.Tensor) -> torch.Tensor:
    """How much better each answer is than the others to its question; both float32 [number of answers]."""
    groups = rewards.view(-1, NUM_SAMPLES)
    spread = groups.std(dim=1, keepdim=True) + 0.05
    return ((groups - groups.mean(dim=1, keepdim=True)) / spread).view(-1)


def draw(rewards: list[float], path: Path) -> None:
    """The curve as an SVG picture."""
    width, height, left, bottom = 640, 320, 50, 40
    top = max(1e-9, *rewards)

    def point(step: int, value: float) -> str:
        x = left + step * (width - left - 20) / max(1, len(rewards) - 1)
        return f"{x:.1f},{height - bottom - value / top * (height - bottom - 30):.1f}"

    means = [mean(rewards[max(0, step + 1 - SMOOTHED) : step + 1]) for step in range(len(rewards))]
    lines = [
        ("#9ab", " ".join(point(*one) for one in enumerate(rewards))),
        ("#064", " ".join(point(*one) for one in enumerate(means))),
    ]
    axis = height - bottom
    curves = "".join(
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>' for color, points in lines
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<path d="M{left},20V{axis}H{width - 20}" fill="none" stroke="#333"/>{curves}'
        f'<text x="{left - 6}" y="34" text-anchor="end">{top:.2f}</text>'
        f'<text x="{left - 6}" y="{axis}" text-anchor="end">0</text>'
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">step (0 to {len(rewards) - 1})</text>'
        f'<text x="{left + 10}" y="16">mean reward of a step, and of {SMOOTHED} steps</text></svg>\n'
    )


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def learn(rollouts: Rollouts, num_steps: int) -> list[float]:
    """The mean reward of each step."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    questions = [question for question, _ in make_dialogues()]
    generator = torch.Generator().manual_seed(0)
    rewards, seconds = [], dict.fromkeys(("publish", "take", "sample", "train"), 0.0)
    options = {"metadata": rollouts.metadata, "model_name": MODEL_NAME, "dtype": torch.bfloat16}
    with WeightPublisher(model, **options) as publisher:
        for step in range(num_steps):
            version, times = f"step-{step}", [time.perf_counter()]
            publisher.publish(version)
            times.append(time.perf_counter())
            rollouts.take(version)
            times.append(time.perf_counter())
            chosen = torch.randperm(len(questions), generator=generator)[:NUM_QUESTIONS].tolist()
            prompts = [encode(tokenizer, questions[number]) for number in chosen for _ in range(NUM_SAMPLES)]
            answers = rollouts.sample(prompts, version)
            times.append(time.perf_counter())
            found = torch.tensor([reward(answer["text"]) for answer in answers])
            take_step(model, optimizer, prompts, [answer["output_ids"] for answer in answers], advantages_of(found))
            times.append(time.perf_counter())
            rewards.append(found.mean().item())
            for name, start, stop in zip(seconds, times, times[1:], strict=False):
                seconds[name] += stop - start
            print(f"step {step:3}  reward {rewards[-1]:.3f}  {answers[0]['text']!r}", flush=True)
    parts = ", ".join(f"{name} {total / num_steps:.3f} s" for name, total in seconds.items())
    print(f"each step on average: {parts}")
    return rewards


def encode(tokenizer: Tokenizer, question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(text, add_special_tokens=False).ids


def main() -> int:
    parser = argparse.ArgumentParser(description="Learn by reinforcement, with a trainer that publishes its weights.")
    parser.add_argument("--steps", type=int, default=30, help="Steps of the trainer (default: 30).")
    parser.add_argument("--picture", type=Path, default=Path("rl_loop.svg"), help="Where the curve goes, as SVG.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of the trainer (default: 2).")
    parser.add_argument("--timeout", type=float, default=120.0, help="Seconds for an instance to be ready.")
    parser.add_argument("--log-dir", type=Path, help="Folder of the processes' logs; else a temporary one.")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    torch.set_num_threads(args.threads)
    logs = args.log_dir or Path(tempfile.mkdtemp(prefix="rl-loop-"))
    logs.mkdir(parents=True, exist_ok=True)
    rollouts = Rollouts(logs, args.timeout)
    try:
        rollouts.wait_ready()
        rewards = learn(rollouts, args.steps)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        stop_all(rollouts.running)
    draw(rewards, args.picture)
    compared = min(SMOOTHED, len(rewards) // 2)
    first, last = mean(rewards[:compared]), mean(rewards[-compared:])
    print(f"mean reward {first:.3f} in the first {compared} steps, {last:.3f} in the last; the curve is {args.picture}")
    return 0 if last >= first + WANTED_RISE else 1


if __name__ == "__main__":
    sys.exit(main())
