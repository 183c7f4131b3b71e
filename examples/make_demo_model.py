"""Makes the small model that the repository ships: trains its tokenizer and its weights from demo_corpus.py.

    python examples/make_demo_model.py [--output examples/demo_model] [--steps 500] [--threads 2]

Takes some minutes on two cores. Needs the `test` extra (transformers). The result is a Llama of about three million
parameters, stored in bfloat16, that answers the questions of its corpus and nothing else.
"""

import argparse
import json
import logging
import math
import random
import time
from pathlib import Path

import torch
from demo_corpus import make_dialogues, vary
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
IM_END = 2
CONTEXT_LEN = 1024
BATCH_SIZE = 24
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
logger = logging.getLogger("make_demo_model")


def render(question: str, answer: str) -> str:
    """The dialogue as the chat template writes it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def train_tokenizer(dialogues: list[tuple[str, str]], folder: Path) -> Tokenizer:
    """Train the byte-level BPE tokenizer and write its two files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"user\n{q}\nassistant\n{a}" for q, a in dialogues), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LEN,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def make_batch(dialogues: list[tuple[str, str]], tokenizer: Tokenizer, generator: random.Random) -> dict:
    """Token ids and labels of some dialogues, int64 [BATCH_SIZE, longest]; padding and questions have label -100."""
    rows, starts = [], []
    for question, answer in generator.sample(dialogues, BATCH_SIZE):
        text = render(vary(question, generator), answer)
        rows.append(tokenizer.encode(text, add_special_tokens=False).ids)
        starts.append(len(tokenizer.encode(text.removesuffix(f"{answer}<|im_end|>"), add_special_tokens=False).ids))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor(
        [[-100] * start + row[start:] + [-100] * (longest - len(row)) for row, start in zip(rows, starts, strict=True)]
    )
    return {"input_ids": ids, "attention_mask": (labels != -100) | (ids != 0), "labels": labels}


def train(model: LlamaForCausalLM, dialogues: list[tuple[str, str]], tokenizer: Tokenizer, num_steps: int) -> None:
    """AdamW with a warm-up and a cosine decay to zero."""
    generator = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    start = time.monotonic()
    for step in range(num_steps):
        scale = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * scale
        loss = model(**make_batch(dialogues, tokenizer, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == num_steps - 1:
            logger.info("step %d loss %.3f after %.0f s", step, loss.item(), time.monotonic() - start)


@torch.inference_mode()
def count_correct(model: LlamaForCausalLM, dialogues: list[tuple[str, str]], tokenizer: Tokenizer) -> int:
    """How many of the corpus' questions the model answers word for word, greedily."""
    correct = 0
    for question, answer in dialogues:
        prompt = tokenizer.encode(render(question, "").removesuffix("<|im_end|>"), add_special_tokens=False).ids
        output = model.generate(torch.tensor([prompt]), max_new_tokens=80, do_sample=False)[0, len(prompt) :]
        correct += tokenizer.decode(output.tolist()) == answer
    return correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo_model")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    dialogues = make_dialogues()
    tokenizer = train_tokenizer(dialogues, args.output)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LEN,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IM_END,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%d dialogues, %d tokens, %d parameters", len(dialogues), config.vocab_size, num_parameters)
    train(model.train(), dialogues, tokenizer, args.steps)
    model.eval().to(torch.bfloat16)
    model.generation_config.do_sample = False
    model.save_pretrained(args.output)
    logger.info("answers %d of %d questions word for word", count_correct(model, dialogues, tokenizer), len(dialogues))


if __name__ == "__main__":
    main()
